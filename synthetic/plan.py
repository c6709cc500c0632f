"""What is to be made, and who its subjects are: small enough to send to every worker, which draws the rest anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd

from mmjepa.refusal import Refusal
from synthetic import concepts, ct, events, growth, images, leaks
from synthetic.catalogue import catalogue
from synthetic.draws import Array, uniforms
from synthetic.presets import Site, find_preset, find_site, pick
from synthetic.world import Subjects, World, blended

SPLITS = ("train", "tuning", "held_out")
_SPLIT_EDGES = (0.70, 0.85)
MOST_PATIENTS = 1_000_000
_STRANGER = 2**40  # subjects from here on are in no cohort: a mispaired image shows one of them


@dataclass(frozen=True)
class Plan:
    """A source folder to be written, but for its number of patients.

    sites: subjects are dealt to them evenly. image_format: ``nifti`` or ``dicom``. size: voxels along each axis of a patch.
    scans: CTs a subject, the label standing at the last. leaks: names of ``synthetic.leaks.SWITCHES``.
    """

    preset: str
    sites: tuple[Site, ...]
    seed: int
    image_format: str
    size: int
    scans: int
    leaks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The sites' names, joined by +."""
        return "+".join(site.name for site in self.sites)

    @property
    def world(self) -> World:
        return _world(self.preset, self.seed)

    @property
    def salt(self) -> str:
        """The salt of this source's hashed identifiers."""
        return images.digest("salt", self.seed, self.name).hex()[:32]

    @cached_property
    def vocabularies(self) -> list[events.Vocabulary]:
        """What may be recorded, site by site."""
        return [leaks.of_vocabulary(self.leaks, _vocabulary(self.preset, self.seed, site)) for site in self.sites]

    @property
    def labelled_scan(self) -> int:
        """The scan at which labels stand."""
        return leaks.labelled_scan(self.leaks, self.scans)

    def site_of(self, first: int, count: int) -> Array:
        """Position in ``sites`` of each subject, [count]."""
        if len(self.sites) == 1:
            return np.zeros(count, np.int64)
        return np.floor(uniforms(self.seed, "site", first, count, 1)[:, 0] * len(self.sites)).astype(np.int64)

    def sample(self, first: int, count: int, which: Array | None = None) -> Subjects:
        """The subjects of a range, each under the law of its own site, or of the one at position ``which`` [count]."""
        which = self.site_of(first, count) if which is None else which
        return blended([self.world.sample(site, first, count) for site in self.sites], which)


@lru_cache
def _world(preset: str, seed: int) -> World:
    return World.named(preset, seed)


@lru_cache
def _vocabulary(preset: str, seed: int, site: Site) -> events.Vocabulary:
    return events.Vocabulary(catalogue(seed, _world(preset, seed).loaded("ehr")), site)


def check_range(first: int, patients: int, seed: int, workers: int) -> None:
    """Refusal ``SYNTHETIC_RANGE`` where subjects cannot be numbered, drawn or dealt to workers so."""
    for what, value, low, high in (
        ("patients", patients, 1, MOST_PATIENTS),
        ("first", first, 0, MOST_PATIENTS - patients),
        ("seed", seed, 0, 2**63 - 1),
        ("workers", workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise Refusal("SYNTHETIC_RANGE", f"{what}={value} is outside {low}..{high}")


def checked(
    first: int,
    patients: int,
    sites: str | Site | Sequence[str | Site],
    preset: str,
    seed: int,
    image_format: str,
    workers: int,
    size: int,
    scans: int,
    leak: Sequence[str],
) -> Plan:
    """The plan of these wishes; Refusal ``SYNTHETIC_UNKNOWN`` (names) or ``SYNTHETIC_RANGE`` (numbers) otherwise."""
    find_preset(preset)
    wanted = [sites] if isinstance(sites, str | Site) else list(sites)
    found = tuple(find_site(preset, site) if isinstance(site, str) else site for site in wanted)
    if not found or any(len({getattr(site, k) for site in found}) < len(found) for k in ("name", "offset")):
        raise Refusal("SYNTHETIC_RANGE", "sites must be named once each, and at least one")
    pick(dict.fromkeys(images.FORMATS), image_format, "image format")
    for name in leak:
        pick(leaks.SWITCHES, name, "leak")
    if size not in ct.SIZES:
        raise Refusal("SYNTHETIC_RANGE", f"size={size} is not one of {', '.join(map(str, ct.SIZES))}")
    if not 1 <= scans <= len(growth.SCAN_DAYS):
        raise Refusal("SYNTHETIC_RANGE", f"scans={scans} is outside 1..{len(growth.SCAN_DAYS)}")
    check_range(first, patients, seed, workers)
    leaks.check(leak, scans)
    return Plan(preset, found, seed, image_format, size, scans, tuple(dict.fromkeys(leak)))


def split_of(uniform: Array) -> Array:
    """train, tuning or held_out, [n], of uniforms [n]: 70, 15 and 15 in a hundred."""
    return np.array(SPLITS)[np.searchsorted(_SPLIT_EDGES, uniform, side="right")]


def people(plan: Plan, first: int, count: int, subjects: Subjects) -> pd.DataFrame:
    """Who the subjects are, one row each.

    Columns: subject_id, patient_id; site (its position); split; index_s (cohort clock, s) of the first CT; day_0 ... of every
    CT after it; shift_days; mispaired, unpaired (train alone).
    """
    index, which = range(first, first + count), plan.site_of(first, count)
    u = uniforms(plan.seed, "people", first, count, 5)
    shift = (30 + np.floor(u[:, 3] * 1500)).astype(np.int64) * np.where(u[:, 4] < 0.5, -1, 1)
    split = split_of(u[:, 0])
    start = int.from_bytes(images.digest("patient_id", plan.seed, plan.name)[:4], "big")
    days = growth.scan_days(plan.seed, first, count, plan.scans)
    found = {
        "subject_id": np.array([site.offset for site in plan.sites])[which] + 1 + np.array(index),
        # a bijection of the index: the factor shares no divisor with the modulus
        "patient_id": [
            f"H{plan.sites[w].name[0].upper()}{1_000_000 + (start + i * 7_368_787) % 9_000_000}"
            for i, w in zip(index, which, strict=True)
        ],
        "site": which,
        "split": split,
        "index_s": events.index_time_s(u[:, 1:3]),
        **{f"day_{k}": day for k, day in enumerate(days.T)},
        "shift_days": shift,
    }
    for column, knob in (("mispaired", "mispair"), ("unpaired", "unpaired")):
        share = np.array([getattr(site, knob) for site in plan.sites])[which]
        found[column] = (uniforms(plan.seed, knob, first, count, 1)[:, 0] < share) & (split == "train")
    return leaks.of_people(plan.leaks, pd.DataFrame(found), subjects)


def scan_name(plan: Plan, site: Site, subject: int, scan: int) -> str:
    """Made-up name of an image file or folder."""
    return f"scan_{images.digest('name', *_scan_key(plan, site, subject, scan)).hex()[:12]}"


def scan_uid(plan: Plan, site: Site, subject: int, scan: int) -> images.UID:
    """Its SeriesInstanceUID."""
    return images.uid(*_scan_key(plan, site, subject, scan))


def _scan_key(plan: Plan, site: Site, subject: int, scan: int) -> tuple[int | str, ...]:
    return (plan.seed, site.name, subject, scan)


def image_id(plan: Plan, site: Site, subject: int, scan: int) -> str:
    """The cohort's id of an image."""
    if plan.image_format == "dicom":
        return images.image_id(plan.salt, scan_uid(plan, site, subject, scan))
    return images.image_id(plan.salt, f"{scan_name(plan, site, subject, scan)}.nii")


def scan_time(person: Mapping[Any, Any], scan: int) -> datetime:
    """A CT's date and time as the hospital has it: cohort time minus the person's shift."""
    second = scan_second(person, scan) - person["shift_days"] * events.DAY
    return datetime.fromtimestamp(second, UTC).replace(tzinfo=None)


def scan_second(person: Mapping[Any, Any], scan: int) -> int:
    """A CT's time on the cohort's clock, s."""
    return person["index_s"] + int(person[f"day_{scan}"] * events.DAY)


def pictures(plan: Plan, first: int, persons: pd.DataFrame, subjects: Subjects) -> list[pd.DataFrame]:
    """Parameters of every image, one frame a scan and one row a subject; ``body`` keys the anatomy.

    A mispaired image shows a stranger, scanned at the same site as everybody there.
    """
    frames = _bodies(plan, first, persons, subjects)
    hit = persons["mispaired"].to_numpy()
    if hit.any():
        strangers = plan.sample(first + _STRANGER, len(persons), persons["site"].to_numpy())
        for mine, other in zip(frames, _bodies(plan, first + _STRANGER, persons, strangers), strict=True):
            mine[hit] = other[hit]
    return leaks.of_pictures(plan.leaks, frames)


def _bodies(plan: Plan, first: int, persons: pd.DataFrame, subjects: Subjects) -> list[pd.DataFrame]:
    n, seed = len(persons), plan.seed
    protocol, names = uniforms(seed, "ct/protocol", first, n, 3), plan.world.loaded("image")
    facts = concepts.draw(subjects.t, seed, first)[:, concepts.IN_IMAGE]
    parts = [ct.parameters(subjects.t["image"], names, protocol, site, facts) for site in plan.sites]
    which = persons["site"].to_numpy()
    start = parts[0].copy()
    for k, part in enumerate(parts[1:], 1):
        start[which == k] = part[which == k]
    start["body"] = np.arange(first, first + n)
    sizes_mm = growth.diameters(start["diameter_mm"].to_numpy(), subjects.y, seed, first, plan.scans)
    return [start.assign(diameter_mm=sizes_mm[:, k]) for k in range(plan.scans)]
