"""Images known too early, needed before they exist, or placed by what a later one shows."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mmjepa.audit.images import known_before_taken, only_later_images, placed_by_a_later_image
from mmjepa.audit.labels import Task
from mmjepa.ct.store import VolumeStore, write_voxels
from mmjepa.files import write_json

T = pd.Timestamp("2100-01-01")
DAY = pd.Timedelta(days=1)
DAY_US = 86_400_000_000
T_US = T.value // 1000
PAIRS, SIDE = 40, 24


def index_of(times: dict[str, tuple[int, pd.Timestamp]]) -> pd.DataFrame:
    rows = [(image, subject, time) for image, (subject, time) in times.items()]
    return pd.DataFrame(rows, columns=["image_id", "subject_id", "time"])


def test_a_record_row_that_knows_an_image_before_it_was_taken_fails():
    index = index_of({"a": (1, T), "b": (2, T), "c": (3, pd.NaT)})
    store = SimpleNamespace(image_ids={0: "a", 1: "b", 2: "c", 3: "not ingested"}, available_us=np.full(4, T_US))
    assert known_before_taken(store, index).verdict == "pass"
    store.available_us = np.array([T_US, T_US - DAY_US, 0, 0])
    found = known_before_taken(store, index)
    assert (found.verdict, found.count) == ("fail", 1)
    assert known_before_taken(SimpleNamespace(image_ids={}), index).verdict == "not-applicable"


def test_prediction_times_before_the_first_image_warn_with_their_count():
    index = index_of({"a": (1, T), "b": (1, T + 9 * DAY), "c": (2, T + DAY), "d": (3, pd.NaT)})
    subject_id = np.array([1, 2, 3, 4])
    task = Task("t", np.arange(4), np.full(4, T_US), np.zeros(4), subject_id, np.arange(4))
    found = only_later_images(task, index)
    assert (found.verdict, found.count) == ("warn", 1)
    assert only_later_images(task, index[index["subject_id"] != 2]).verdict == "pass"


def crops(folder: Path, sideways: float, side: int = SIDE) -> VolumeStore:
    """Two crops a subject of a ball that grows; the earlier one lies aside by ``sideways`` of what its radius will gain."""
    draw, rows = np.random.default_rng(0), []
    (folder / "ct" / "volumes").mkdir(parents=True)
    axis = np.arange(side) - (side - 1) / 2
    for subject in range(PAIRS):
        gain, place = draw.uniform(0, 3), draw.normal(size=3)
        for scan in (0, 1):
            centre = place - [0, (1 - scan) * sideways * gain, 0]
            far = np.sqrt(
                sum((g - c) ** 2 for g, c in zip(np.meshgrid(axis, axis, axis, indexing="ij"), centre, strict=True))
            )
            hu = np.clip(
                -850 + 900 / (1 + np.exp(far - 4 - scan * gain)) + 20 * draw.normal(size=far.shape), -1000, 400
            )
            image = f"{subject}-{scan}"
            written = write_voxels(folder / "ct" / "volumes", image, hu.astype(np.int16))
            facts = {"source_hash": image, "affine": np.eye(4).tolist(), "shape": [side] * 3}
            write_json(folder / "ct" / "volumes" / f"{image}.json", written | facts)
            rows.append((image, subject, T + scan * 90 * DAY, image))
    index = pd.DataFrame(rows, columns=["image_id", "subject_id", "time", "source_hash"])
    sizes = {f"shape_{a}": side for a in "xyz"} | {f"spacing_{a}": 1.0 for a in "xyz"}
    index.sample(frac=1, random_state=0).assign(**sizes).to_parquet(folder / "ct" / "index.parquet")
    return VolumeStore(folder)


@pytest.mark.parametrize(("sideways", "verdict"), [(0.0, "pass"), (1.0, "fail")])
def test_an_earlier_crop_that_lies_aside_by_what_will_grow_fails(tmp_path, sideways, verdict):
    found = placed_by_a_later_image(crops(tmp_path, sideways))
    assert found.verdict == verdict, found.sentence
    assert found.count == int(verdict == "fail")


def test_whole_chests_and_single_images_are_not_asked(tmp_path):
    volumes = crops(tmp_path, 1.0)
    whole = volumes.index.assign(spacing_x=10.0)
    single = volumes.index.drop_duplicates("subject_id")
    for volumes.index in (whole, single):
        assert placed_by_a_later_image(volumes).verdict == "not-applicable"
