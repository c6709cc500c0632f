"""Presets (a world's constants) and sites (the knobs by which hospitals differ), by name and by hand."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from mmjepa.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes, amplitudes (``a_<block>_<modality>``) and label weights of a world; defaults are LI2025.

    Blocks of z: s shared biology (2), u_image and u_ehr unique to one modality (2 each), b shared but irrelevant,
    n_image and n_ehr nuisance; c is the care pathway, caused by the label. w_b > 0 makes age and habitus matter (fairness).
    n_unlabelled, n_labelled: subjects the arms learn from. rank: of the closed-form JEPA's codes.
    """

    k_c: int = 1
    k_b: int = 2
    k_n_image: int = 8
    k_n_ehr: int = 12
    d_image: int = 48
    d_ehr: int = 128
    a_s_image: float = 0.22
    a_s_ehr: float = 1.0
    a_u_image: float = 1.1
    a_u_ehr: float = 0.6
    a_c_image: float = 0.13
    a_c_ehr: float = 0.7
    a_b: float = 0.5
    a_n: float = 0.7
    w_s: float = 1.45
    w_u_image: float = 0.9
    w_u_ehr: float = 0.1
    w_b: float = 0.0
    bias: float = -0.6
    tau: float = 1.0
    n_unlabelled: int = 4000
    n_labelled: int = 400
    rank: int = 5

    @property
    def blocks(self) -> dict[str, int]:
        """Widths of the blocks of z, in order."""
        return {
            "s": 2,
            "u_image": 2,
            "u_ehr": 2,
            "b": self.k_b,
            "n_image": self.k_n_image,
            "n_ehr": self.k_n_ehr,
        }


@dataclass(frozen=True, kw_only=True)
class Site:
    """Knobs of one site, one failure mode each; a field's default is its neutral value, rho's is the internal site's.

    Label and latents: ``rho`` how strongly the label drives the care pathway c (spurious label); ``c_mean`` mean of c that
    the label does not drive (pure acquisition offset; never conflate the two); ``spec`` spread of the image-unique block
    (case spectrum); ``bias_shift`` of the label's log-odds (prevalence); ``w_u_ehr_factor`` on the label's EHR-unique weight
    (concept); ``group_shift`` mean of the factor behind sex (group by site); ``label_flip`` share of recorded labels that are
    wrong; ``follow_up_days`` 31..365 a cancer found later counts as none.
    Measurement: ``code_shift`` share of EHR channels that carry their neighbour's value; ``ehr_missing`` share of subjects
    without a record; ``noise_image`` factor on the image's noise.
    Rendered CT alone: ``gain``, ``hu_bias``, ``cup_hu`` (cupping 16 mm off the axis), ``kernel_mix`` shares of smooth, standard
    and sharp, ``thick_mm`` of the slices that are not thin, ``voxel_mm`` in the plane (field of view).
    Records alone: ``vocabulary_split`` share of codes that two codes stand for, ``vocabulary_merge`` share of codes that share
    another's, ``lab_unit`` share of labs in another unit, ``coding_delay_days`` from discharge to a diagnosis code.
    Pretraining (train split alone): ``mispair`` share of images of somebody else; ``unpaired`` share without an image.
    ``offset``: of subject ids; sites never collide.
    """

    name: str
    offset: int
    rho: float
    c_mean: float = 0.0
    spec: float = 1.0
    bias_shift: float = 0.0
    w_u_ehr_factor: float = 1.0
    group_shift: float = 0.0
    label_flip: float = 0.0
    follow_up_days: int = 365
    code_shift: float = 0.0
    ehr_missing: float = 0.0
    noise_image: float = 1.0
    gain: float = 1.0
    hu_bias: float = 0.0
    cup_hu: float = 0.0
    kernel_mix: tuple[float, float, float] = (0.25, 0.5, 0.25)
    thick_mm: float = 2.5
    voxel_mm: float = 1.0
    vocabulary_split: float = 0.0
    vocabulary_merge: float = 0.0
    lab_unit: float = 0.0
    coding_delay_days: int = 0
    mispair: float = 0.0
    unpaired: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", self.name):  # it stands in codes and in DICOM patient ids
            raise Refusal(
                "SYNTHETIC_RANGE", f"{self.name!r} names no site", "Take a letter, then letters, digits, _ or -"
            )
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise Refusal("SYNTHETIC_RANGE", f"{name}={getattr(self, name)} is outside {low}..{high}")
        mix = self.kernel_mix
        if len(mix) != 3 or not (min(mix) >= 0 and abs(sum(mix) - 1) < 1e-9):
            raise Refusal("SYNTHETIC_RANGE", f"kernel_mix={mix} is not three shares of 1: smooth, standard, sharp")


FOLLOW_UP_DAYS = (30, 365)  # from the CT to a cancer's diagnosis, uniform
_SHARES = [
    "code_shift",
    "ehr_missing",
    "vocabulary_split",
    "vocabulary_merge",
    "lab_unit",
    "mispair",
    "unpaired",
]
_RANGES: dict[str, tuple[float, float]] = {
    **{name: (0, 1) for name in _SHARES},
    "label_flip": (0, 0.5),  # beyond it a label would say the opposite
    "rho": (-5, 5),
    "c_mean": (-10, 10),
    "spec": (0.01, 10),
    "bias_shift": (-10, 10),
    "w_u_ehr_factor": (-100, 100),
    "group_shift": (-10, 10),
    "follow_up_days": (31, 365),
    "noise_image": (0.01, 100),
    "gain": (0.5, 2),
    "hu_bias": (-500, 500),
    "cup_hu": (-500, 500),
    "thick_mm": (1, 5),
    "voxel_mm": (0.5, 2),
    "coding_delay_days": (0, 365),
}

PRESETS = {
    "li2025": Preset(),
    "groups": Preset(w_b=0.5),
    "base": Preset(
        a_s_image=0.25,
        a_s_ehr=0.7,
        a_u_image=0.55,
        a_c_image=0.15,
        a_c_ehr=0.9,
        a_b=0.8,
        a_n=0.9,
        w_s=1.5,
        w_u_ehr=0.4,
        d_image=128,
        k_n_image=12,
        n_labelled=500,
        rank=6,
    ),
}
_INSIDE, _OUTSIDE = 10_000_000, 20_000_000
SITES = {
    "li2025": {
        "internal": Site(name="internal", rho=0.8, offset=_INSIDE),
        "external": Site(name="external", rho=-0.05, spec=1.4, code_shift=0.15, offset=_OUTSIDE),
    },
    "groups": {
        "internal": Site(name="internal", rho=0.8, offset=_INSIDE),
        "external": Site(name="external", rho=-0.05, spec=1.4, code_shift=0.15, group_shift=1.0, offset=_OUTSIDE),
    },
    "base": {
        "internal": Site(name="internal", rho=0.7, offset=_INSIDE),
        "external": Site(name="external", rho=0.05, spec=1.3, code_shift=0.15, offset=_OUTSIDE),
    },
}


def pick(table: dict[str, Any], name: str, what: str) -> Any:
    """``table[name]``; Refusal ``SYNTHETIC_UNKNOWN`` that names the nearest entry otherwise."""
    if name not in table:
        near = get_close_matches(name, table, n=1)
        known = f"Did you mean {near[0]}? " if near else ""
        raise Refusal("SYNTHETIC_UNKNOWN", f"no {what} is called {name!r}", f"{known}Known: {', '.join(table)}")
    return table[name]


def find_preset(name: str) -> Preset:
    """The preset of that name; Refusal ``SYNTHETIC_UNKNOWN`` otherwise."""
    return pick(PRESETS, name, "preset")


def find_site(preset: str, name: str) -> Site:
    """The site of that name under a preset; Refusal ``SYNTHETIC_UNKNOWN`` otherwise."""
    return pick(pick(SITES, preset, "preset"), name, "site")


def turned(law: Any, knobs: Iterable[str]) -> Any:
    """A site, or another law, with ``knob=value`` settings applied (several numbers with commas between, as kernel_mix has).

    Raises Refusal: ``SYNTHETIC_UNKNOWN`` (no such knob), ``SYNTHETIC_RANGE`` (no such value).
    """
    known = {f.name: getattr(law, f.name) for f in fields(law) if f.name not in ("name", "offset")}
    values: dict[str, Any] = {}
    for knob in knobs:
        name, equals, text = knob.partition("=")
        now = pick(known, name, "knob")
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        scalar = not isinstance(now, tuple)
        whole = isinstance(now, int)
        if not equals or not numbers or (scalar and len(numbers) > 1) or (whole and not numbers[0].is_integer()):
            raise Refusal("SYNTHETIC_RANGE", f"{knob!r} does not set the knob {name}", "Write it as knob=value")
        values[name] = numbers if not scalar else int(numbers[0]) if whole else numbers[0]
    return replace(law, **values)


def find_sites(preset: str, names: Iterable[str], knobs: Iterable[str]) -> list[Site]:
    """Sites by name, with knobs turned: ``knob=value`` at every site, ``name.knob=value`` at that one.

    A name of no known site makes a new one, the internal site but for its own knobs, of which there must be one.
    Raises the Refusals of ``find_site`` and ``turned``.
    """
    names, knobs = list(names), list(knobs)
    settings = [knob.partition("=")[0].rpartition(".")[0] for knob in knobs]
    for site in {site for site in settings if site} - set(names):
        raise Refusal("SYNTHETIC_UNKNOWN", f"a knob is set for {site!r}, which is no site asked for")
    found = []
    for position, name in enumerate(names):
        if name in pick(SITES, preset, "preset") or name not in settings:
            site = find_site(preset, name)
        else:
            site = replace(find_site(preset, "internal"), name=name, offset=_OUTSIDE + _INSIDE * (1 + position))
        mine = [
            knob.removeprefix(f"{name}.") for knob, owner in zip(knobs, settings, strict=True) if owner in ("", name)
        ]
        found.append(turned(site, mine))
    return found


def describe(preset: Preset, site: Site) -> dict[str, Any]:
    """Every number of a preset and a site, for a truth folder's manifest."""
    return {f.name: getattr(part, f.name) for part in (preset, site) for f in fields(part)}
