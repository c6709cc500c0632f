"""What can be recorded: 400 visit codes and 20 labs, with names a reader understands and loadings on the EHR readout."""

from dataclasses import dataclass

import numpy as np

from synthetic.draws import Array, generator

N_CODES, N_PATHWAY, N_LABS = 400, 12, 20
_PATHWAY_RANKS = 2 + 4 * np.arange(N_PATHWAY)  # frequent: a record holds about 7 tenths of t_c's variance
_ORGANS = """heart;aorta;coronary artery;peripheral artery;deep vein;lung;pleura;bronchus;larynx;kidney;bladder;prostate or
uterus;liver;gallbladder;pancreas;stomach;colon;thyroid;adrenal gland;pituitary;spine;hip joint;knee joint;skin;eye"""
_CONDITIONS = (
    "chronic inflammation;acute infection;stenosis;benign growth;functional disorder;injury;degeneration;effusion"
)
_DRUGS = """beta blocker;ACE inhibitor;statin;loop diuretic;thiazide;anticoagulant;platelet inhibitor;insulin;metformin;
sulfonylurea;inhaled corticosteroid;inhaled beta agonist;inhaled anticholinergic;penicillin;macrolide;quinolone;opioid;
paracetamol;nonsteroidal anti-inflammatory;proton pump inhibitor;antidepressant;antipsychotic;benzodiazepine;thyroxine;
nicotine replacement"""
_FORMS = "tablet, low dose;tablet, high dose;oral solution;injection"
_SITES = """head;neck;chest wall;heart;lung;pleura;abdomen;liver;kidney;bladder;pelvis;colon;stomach;oesophagus;spine;shoulder;
hip;knee;foot;hand;skin;eye"""
_ACTS = "ultrasound;radiograph;endoscopy or puncture;minor surgery"
_PATHWAY = """Referral to a pulmonologist;Referral to a thoracic surgeon;Referral to an oncologist;Referral to smoking cessation;
Referral to a nodule clinic;Referral to cardiology;Urgent imaging pathway;Contrast-enhanced protocol ordered;Low-dose protocol
ordered;Thin-slice protocol ordered;Multidisciplinary board discussion;Second reading requested"""
# name, unit, mean, sd of 20 blood tests
_LABS = """Haemoglobin,g/dL,13.6,1.6;Leukocytes,10^9/L,7.4,2.1;Platelets,10^9/L,248,66;Sodium,mmol/L,139.5,3;Potassium,mmol/L,4.2,.45;
Chloride,mmol/L,103,3.4;Bicarbonate,mmol/L,25,2.9;Urea,mmol/L,6.2,1.9;Creatinine,mg/dL,1,.26;Glucose,mg/dL,108,24;Calcium,mg/dL,9.3,.5;
Albumin,g/dL,4,.42;Bilirubin,mg/dL,.7,.25;Alanine aminotransferase,U/L,26,9;Alkaline phosphatase,U/L,82,22;Lactate dehydrogenase,U/L,190,42;
C-reactive protein,mg/L,9,3.5;Ferritin,ng/mL,140,46;Thyrotropin,mU/L,2,.7;Erythrocyte sedimentation rate,mm/h,18,6"""


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", " ").split(";")]


@dataclass(frozen=True)
class Catalogue:
    """World constants of the record.

    codes, descriptions: 400 visit codes by falling frequency. rate [400] log-rate a visit at t = 0. loading [400, q] and
    lab_loading [20, q] on the EHR readout, whose last coordinate is the care pathway: the 12 referral and protocol codes
    load on it alone, nothing else does. at_discharge [400]: known only when the visit ends (diagnoses).
    """

    codes: list[str]
    descriptions: list[str]
    rate: Array
    loading: Array
    at_discharge: Array
    labs: list[str]
    lab_descriptions: list[str]
    lab_mean: Array
    lab_sd: Array
    lab_loading: Array


def catalogue(seed: int, names: list[str]) -> Catalogue:
    """The catalogue of one seed; ``names`` are the coordinates of the EHR readout, pathway last."""
    families = {
        "DIAGNOSIS": [f"{c} of the {o}" for o in _parts(_ORGANS) for c in _parts(_CONDITIONS)],
        "MEDICATION": [f"{d}, {f}" for d in _parts(_DRUGS) for f in _parts(_FORMS)],
        "PROCEDURE": [f"{a} of the {s}" for s in _parts(_SITES) for a in _parts(_ACTS)],
    }
    clinical = [(f"{kind}//{kind[0]}{i:03d}", text) for kind, texts in families.items() for i, text in enumerate(texts)]
    pathway = [
        (f"{'REFERRAL' if text.startswith('Referral') else 'PROTOCOL'}//R{i:03d}", text)
        for i, text in enumerate(_parts(_PATHWAY))
    ]
    draw = generator(seed, "world/catalogue")
    order = draw.permutation(len(clinical))
    is_pathway = np.isin(np.arange(N_CODES), _PATHWAY_RANKS)
    entries: list[tuple[str, str]] = [("", "")] * N_CODES
    for rank, entry in zip(np.flatnonzero(~is_pathway), (clinical[i] for i in order), strict=True):
        entries[rank] = entry
    for rank, entry in zip(_PATHWAY_RANKS, pathway, strict=True):
        entries[rank] = entry
    width = len(names)
    loading = _sparse_loading(draw, 0.5 * draw.standard_normal(2 * N_CODES), draw.integers(1, 3, N_CODES), width)
    loading[is_pathway] = 0
    loading[is_pathway, -1] = 1.2 * np.where(np.arange(N_PATHWAY) % 3 < 2, 1, -1)
    # labs have entries of one size, so that no seed hides a coordinate from the record
    lab_entries, lab_count = draw.choice([-0.5, 0.5], 2 * N_LABS), draw.integers(1, 3, N_LABS)
    labs = [lab.split(",") for lab in _parts(_LABS)]
    return Catalogue(
        codes=[code for code, _ in entries],
        descriptions=[text[0].upper() + text[1:] for _, text in entries],
        rate=-2 - 4 * np.log(np.arange(1, N_CODES + 1)) / np.log(N_CODES),
        loading=loading,
        at_discharge=np.array([code.startswith("DIAGNOSIS") for code, _ in entries]),
        labs=[f"LAB//L{i:02d}//{lab[1]}" for i, lab in enumerate(labs)],
        lab_descriptions=[f"{lab[0]} in blood" for lab in labs],
        lab_mean=np.array([float(lab[2]) for lab in labs]),
        lab_sd=np.array([float(lab[3]) for lab in labs]),
        lab_loading=_sparse_loading(draw, lab_entries, lab_count, width),
    )


def _sparse_loading(draw: np.random.Generator, entries: Array, count: Array, width: int) -> Array:
    """[rows, width] with ``count`` entries a row, never in the last column; columns are dealt in turn, so that none goes unseen."""
    loading = np.zeros((len(count), width))
    row = np.repeat(np.arange(len(count)), count)
    loading[row, np.resize(draw.permutation(width - 1), len(row))] = entries[: len(row)]
    return loading
