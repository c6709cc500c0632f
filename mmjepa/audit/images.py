"""Check 13 for images: known before they were taken, needed before they exist, placed by what a later one shows."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from mmjepa.audit.events import NEVER
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.labels import Task
from mmjepa.audit.scan import SIGNIFICANT
from mmjepa.ct.store import VolumeStore
from mmjepa.ehr.store import to_us

MINUTE_US = 60_000_000
MAX_CROP_MM, MAX_PAIRS, MIN_PAIRS = 130.0, 400, 30  # larger volumes are whole chests: where they begin tells nothing
DENSE_HU, CHANGE_HU, SMOOTH_MM, CORE_MM = -600.0, 60.0, 1.5, 12.0


def known_before_taken(store: Any, index: pd.DataFrame) -> Finding:
    """Check 13: record rows of an image that can be read before the image's own time.

    store: the event store. index: the image index.
    """
    name = "image known before it was taken"
    taken = index.dropna(subset=["time"])
    taken_us = dict(zip(taken["image_id"], to_us(taken["time"]), strict=True))
    rows = [(row, taken_us[image]) for row, image in store.image_ids.items() if image in taken_us]
    if not rows:
        return not_applicable("13b", name, "no record row names an image with a time")
    early = sum(int(store.available_us[row]) < time_us - MINUTE_US for row, time_us in rows)
    sentence = f"{early} of {len(rows)} record rows of images can be read before the image was taken"
    return judge("13b", name, early, sentence, "Set their available_time to the acquisition, not to the order")


def only_later_images(task: Task, index: pd.DataFrame) -> Finding:
    """Check 13: prediction times of subjects all of whose images come later."""
    name = "only later images"
    taken = index.dropna(subset=["time"])
    first = pd.Series(to_us(taken["time"]), index=taken["subject_id"].to_numpy()).groupby(level=0).min()
    first_us = first.reindex(task.subject_id, fill_value=NEVER).to_numpy(np.int64)
    count = int(((first_us != NEVER) & (first_us > task.t_us)).sum())
    sentence = f"{count} prediction times lie before the first image of their subject"
    advice = "Pair images as of the prediction time: nearest in time would show the future"
    return judge("13c", name, count, sentence, advice, fires="warn")


def placed_by_a_later_image(volumes: VolumeStore) -> Finding:
    """Check 13: how much dense tissue moves between a subject's first and last crop tells how much of it was gained.

    A crop placed without knowledge of the later image shows a growth around what grows; one centred by the later image shows it
    to one side, the more so the more it grew. Spearman's test for each axis, over subjects with two small volumes of one size.
    """
    name = "crop placed by a later image"
    pairs = _pairs(volumes)
    if len(pairs) < MIN_PAIRS:
        return not_applicable("13d", name, f"fewer than {MIN_PAIRS} subjects have two small volumes of one size")
    moved, gained = (np.array(column) for column in zip(*(_change(volumes, *pair) for pair in pairs), strict=True))
    tests = [spearmanr(moved[:, axis], gained) for axis in range(3)]
    hits = [axis for axis, test in zip("xyz", tests, strict=True) if test.pvalue * 3 < SIGNIFICANT]
    shown = ", ".join(f"{axis} {test.statistic:+.2f}" for axis, test in zip("xyz", tests, strict=True))
    sentence = f"over {len(pairs)} subjects the shift of dense tissue correlates with its growth by {shown}"
    return judge("13d", name, len(hits), sentence, "Centre each crop by what its own image, or an earlier one, shows")


def _pairs(volumes: VolumeStore) -> list[tuple[str, str]]:
    """The first and the last small volume of each subject, by time; as many as a test needs."""
    index = volumes.index.dropna(subset=["time"])
    width = np.max([index[f"shape_{axis}"] * index[f"spacing_{axis}"] for axis in "xyz"], axis=0)
    small = index[width <= MAX_CROP_MM].sort_values(["subject_id", "time"])
    same = ["subject_id", "shape_x", "shape_y", "shape_z"]
    ends = small.groupby(same)["image_id"].agg(["first", "last"])
    ends = ends[ends["first"] != ends["last"]].head(MAX_PAIRS)
    return list(ends.itertuples(index=False, name=None))


def _change(volumes: VolumeStore, first: str, last: str) -> tuple[np.ndarray, float]:
    """[3] mm by which the middle of the dense tissue moves, and how much more of it there is."""
    spacing = np.array(volumes.spacing_mm(first))
    before, after = (
        gaussian_filter(np.clip(np.asarray(volumes.hu(image)), -900, 100).astype(np.float32), SMOOTH_MM / spacing)
        for image in (first, last)
    )
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(before.shape, spacing, strict=True)]
    middles = [_middle(volume, axes) for volume in (before, after)]
    return middles[1] - middles[0], float(np.clip(after - before - CHANGE_HU, 0, None).sum() * spacing.prod())


def _middle(volume: np.ndarray, axes: list[np.ndarray]) -> np.ndarray:
    """[3] mm: the centre of mass of what is denser than lung, in the core of the crop."""
    core = np.ix_(*(np.abs(axis) < CORE_MM for axis in axes))
    weight = np.clip(volume[core] - DENSE_HU, 0, None)
    near = [axis[np.abs(axis) < CORE_MM] for axis in axes]
    total = max(float(weight.sum()), 1e-9)
    return np.array([(weight.sum(axis=tuple({0, 1, 2} - {k})) * near[k]).sum() / total for k in range(3)])
