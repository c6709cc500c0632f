"""What can be recorded: 400 visit codes and 20 labs, with names a reader understands and loadings on the EHR readout."""

from dataclasses import dataclass

import numpy as np

from synthetic.draws import Array, generator

N_CODES, N_PATHWAY, N_LABS = 400, 12, 20
CODE_SD, PATHWAY_LOADING, LAB_LOADING = 0.5, 1.5, (1.0, 0.5)
_CONCEPT_RANKS = np.arange(20, 150)  # rare without its concept, in most records with it
_ORGANS = """heart;aorta;coronary artery;peripheral artery;deep vein;lung;pleura;bronchus;kidney;bladder;prostate or uterus;
liver;pancreas;stomach;colon;thyroid;spine;skin"""
_CONDITIONS = (
    "chronic inflammation;acute infection;stenosis;benign growth;functional disorder;injury;degeneration;effusion"
)
_DRUGS = """beta blocker;ACE inhibitor;calcium channel blocker;statin;loop diuretic;thiazide;anticoagulant;platelet inhibitor;
insulin;metformin;sulfonylurea;inhaled corticosteroid;inhaled beta agonist;inhaled anticholinergic;penicillin;macrolide;
quinolone;opioid;paracetamol;nonsteroidal anti-inflammatory;proton pump inhibitor;antidepressant;antipsychotic;benzodiazepine;
thyroxine;nicotine replacement"""
_FORMS = "tablet, low dose;tablet, high dose;oral solution;injection"
_SITES = """head;neck;chest wall;heart;lung;pleura;abdomen;liver;kidney;bladder;pelvis;colon;stomach;oesophagus;spine;shoulder;
hip;knee;foot;hand;skin;eye"""
_ACTS = "ultrasound;radiograph;endoscopy or puncture;minor surgery"
_PATHWAY = """Referral to a pulmonologist;Referral to a thoracic surgeon;Referral to an oncologist;Referral to smoking cessation;
Referral to a nodule clinic;Referral to cardiology;Urgent imaging pathway;Contrast-enhanced protocol ordered;Low-dose protocol
ordered;Thin-slice protocol ordered;Multidisciplinary board discussion;Second reading requested"""
# the sparse concepts that records show: 40 of their own, then those that images show too, in the order of their signs
_CONCEPTS = """asbestos exposure;silica exposure;radon exposure;wood dust exposure;welding fume exposure;earlier tuberculosis;
sarcoidosis;rheumatoid arthritis;systemic sclerosis;lupus;Sjogren syndrome;vasculitis;HIV infection;organ transplant;
immune deficiency;earlier chest radiotherapy;earlier chemotherapy;earlier lymphoma;earlier breast cancer;earlier melanoma;
earlier head and neck cancer;family history of lung cancer;alpha-1 antitrypsin deficiency;cystic fibrosis carrier;asthma since
childhood;sleep apnoea;pulmonary embolism;pulmonary hypertension;atrial fibrillation;heart valve replacement;dialysis;cirrhosis;
chronic hepatitis;inflammatory bowel disease;coeliac disease;epilepsy;Parkinson disease;multiple sclerosis;psoriasis;recurrent gout;
long-standing pleural effusion;pleural plaques;clips of earlier lung surgery;lung cyst;bronchiectasis;organising pneumonia;
chronic atelectasis;healed granuloma;fibrosis with honeycombing;bullous lung disease;enlarged chest lymph node;wires of earlier
heart surgery"""
# name, unit, mean, sd, another unit, factor to it, of 20 blood tests
_LABS = """Haemoglobin,g/dL,13.6,1.6,mmol/L,.6206;Leukocytes,10^9/L,7.4,2.1,cells/uL,1000;Platelets,10^9/L,248,66,cells/uL,1000;
Sodium,mmol/L,139.5,3,mg/dL,2.299;Potassium,mmol/L,4.2,.45,mg/dL,3.91;Chloride,mmol/L,103,3.4,mg/dL,3.545;
Bicarbonate,mmol/L,25,2.9,mg/dL,6.102;Urea,mmol/L,6.2,1.9,mg/dL,6.006;Creatinine,mg/dL,1,.26,umol/L,88.42;
Glucose,mg/dL,108,24,mmol/L,.0555;Calcium,mg/dL,9.3,.5,mmol/L,.2495;Albumin,g/dL,4,.42,g/L,10;Bilirubin,mg/dL,.7,.25,umol/L,17.1;
Alanine aminotransferase,U/L,26,9,nkat/L,16.67;Alkaline phosphatase,U/L,82,22,nkat/L,16.67;
Lactate dehydrogenase,U/L,190,42,nkat/L,16.67;C-reactive protein,mg/L,9,3.5,nmol/L,9.524;Ferritin,ng/mL,140,46,pmol/L,2.247;
Thyrotropin,mU/L,2,.7,uU/L,1000;Erythrocyte sedimentation rate,mm/h,18,6,cm/h,.1"""


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", " ").split(";")]


@dataclass(frozen=True)
class Catalogue:
    """World constants of the record, of one seed.

    codes, descriptions: 400 visit codes, the 12 of the care pathway (referrals, protocols) and then the 388 clinical ones,
    either list by falling frequency. rate [400]: log-rate a visit at t = 0. loading [400, q] and lab_loading [20, q] on the
    EHR readout: the pathway's coordinates move the pathway codes and nothing else, the others everything else. at_discharge
    [400]: known only when the visit ends (diagnoses). concept [52]: the code of each concept that records show, in the order of
    ``concepts.IN_EHR``. lab_mean, lab_sd in the unit that ends a lab's code; other_labs: the codes in another unit, whose
    values are lab_factor times as large.
    """

    seed: int
    codes: list[str]
    descriptions: list[str]
    rate: Array
    loading: Array
    at_discharge: Array
    concept: Array
    labs: list[str]
    other_labs: list[str]
    lab_descriptions: list[str]
    lab_mean: Array
    lab_sd: Array
    lab_factor: Array
    lab_loading: Array


def catalogue(seed: int, names: list[str]) -> Catalogue:
    """The catalogue of one seed; ``names`` are the coordinates of the EHR readout, those of the care pathway called c."""
    concepts = _parts(_CONCEPTS)
    families = {
        "DIAGNOSIS": [*concepts, *(f"{c} of the {o}" for o in _parts(_ORGANS) for c in _parts(_CONDITIONS))],
        "MEDICATION": [f"{d}, {f}" for d in _parts(_DRUGS) for f in _parts(_FORMS)],
        "PROCEDURE": [f"{a} of the {s}" for s in _parts(_SITES) for a in _parts(_ACTS)],
    }
    clinical = [(f"{kind}//{kind[0]}{i:03d}", text) for kind, texts in families.items() for i, text in enumerate(texts)]
    pathway = [
        (f"{'REFERRAL' if text.startswith('Referral') else 'PROTOCOL'}//R{i:03d}", text)
        for i, text in enumerate(_parts(_PATHWAY))
    ]
    draw = generator(seed, "world/catalogue")
    concept = draw.permutation(_CONCEPT_RANKS)[: len(concepts)]
    order = np.empty(len(clinical), np.int64)
    order[concept] = np.arange(len(concepts))
    order[np.setdiff1d(np.arange(len(clinical)), concept)] = draw.permutation(np.arange(len(concepts), len(clinical)))
    entries = [*pathway, *(clinical[i] for i in order)]
    codes = [code for code, _ in entries]
    rank = np.r_[1 : N_PATHWAY + 1, 1 : len(clinical) + 1]
    of_pathway = np.array([name.startswith("c") for name in names])
    labs = [lab.split(",") for lab in _parts(_LABS)]
    return Catalogue(
        seed=seed,
        codes=codes,
        descriptions=[text[0].upper() + text[1:] for _, text in entries],
        rate=-2 - 4 * np.log(rank) / np.log(N_CODES),
        loading=np.concatenate([_pathway_loading(of_pathway), _clinical_loading(draw, len(clinical), of_pathway)]),
        at_discharge=np.array([code.startswith("DIAGNOSIS") for code in codes]),
        concept=N_PATHWAY + concept,
        labs=[f"LAB//L{i:02d}//{lab[1]}" for i, lab in enumerate(labs)],
        other_labs=[f"LAB//L{i:02d}//{lab[4]}" for i, lab in enumerate(labs)],
        lab_descriptions=[f"{lab[0]} in blood" for lab in labs],
        lab_mean=np.array([float(lab[2]) for lab in labs]),
        lab_sd=np.array([float(lab[3]) for lab in labs]),
        lab_factor=np.array([float(lab[5]) for lab in labs]),
        lab_loading=_lab_loading(draw, of_pathway),
    )


def _pathway_loading(of_pathway: Array) -> Array:
    """[12, q]: each code follows one of the pathway's coordinates, half of them up and half down, common ones and rare ones alike.

    Were it not so, the mere size of a record would tell of the pathway.
    """
    loading = np.zeros((N_PATHWAY, len(of_pathway)))
    row = np.arange(N_PATHWAY)
    loading[row, np.resize(np.flatnonzero(of_pathway), N_PATHWAY)] = PATHWAY_LOADING * np.where(
        np.isin(row % 4, [0, 3]), 1, -1
    )
    return loading


def _clinical_loading(draw: np.random.Generator, rows: int, of_pathway: Array) -> Array:
    """[rows, q] with one or two entries N(0, .5^2) a row; columns are dealt in turn, so that none goes unseen."""
    loading = np.zeros((rows, len(of_pathway)))
    row = np.repeat(np.arange(rows), draw.integers(1, 3, rows))
    columns = draw.permutation(np.flatnonzero(~of_pathway))
    loading[row, np.resize(columns, len(row))] = CODE_SD * draw.standard_normal(len(row))
    return loading


def _lab_loading(draw: np.random.Generator, of_pathway: Array) -> Array:
    """[20, q]: each lab has a coordinate of its own, dealt in turn and read well, and half of them a weaker second one.

    Entries are of one size, so that no seed hides a coordinate from the record.
    """
    loading = np.zeros((N_LABS, len(of_pathway)))
    columns = draw.permutation(np.flatnonzero(~of_pathway))
    own = np.arange(N_LABS) % len(columns)
    second = (own + draw.integers(1, len(columns), N_LABS)) % len(columns)
    row = draw.permutation(N_LABS)[: N_LABS // 2]
    loading[row, columns[second[row]]] = LAB_LOADING[1] * draw.choice([-1, 1], len(row))
    loading[np.arange(N_LABS), columns[own]] = LAB_LOADING[0] * draw.choice([-1, 1], N_LABS)
    return loading
