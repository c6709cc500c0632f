"""Of several images of a moment one is taken by a rule, and a crop says what it covers."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import windowed
from mmjepa.sample.images import Crops, order_images, say_images

KERNELS = ["B30f", "b70F", "", "LUNG"]


def images(rows):
    index = pd.DataFrame(rows, columns=["kernel", "spacing_z"])
    index["image_id"] = [f"{n:04d}" for n in range(len(index))]
    paired = index[["image_id"]].assign(subject_id=1, prediction_time=pd.Timestamp(0))
    return paired, index


@given(st.lists(st.tuples(st.sampled_from(KERNELS), st.sampled_from([0.7, 5.0])), min_size=1), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_preferred_kernel_comes_first_then_thin_slices_whatever_the_order(rows, random):
    paired, index = images(rows)
    shuffled = paired.sample(frac=1, random_state=random.randrange(1000))
    ordered = order_images(shuffled, index, ("B70F", "lung"))
    assert ordered["image_id"].tolist() == order_images(paired, index, ("B70F", "lung"))["image_id"].tolist()
    taken = index.set_index("image_id").loc[ordered["image_id"].iloc[0]]
    best = min(({"b70f": 0, "lung": 1}.get(kernel.casefold(), 2), thick) for kernel, thick in rows)
    assert ({"b70f": 0, "lung": 1}.get(taken["kernel"].casefold(), 2), taken["spacing_z"]) == best
    assert list(ordered.columns) == list(paired.columns)


def test_without_a_rule_the_thinnest_slices_are_taken_and_no_kernel_is_a_kernel_too():
    paired, index = images([("B30f", 5.0), (None, 0.7), ("B70f", 5.0)])
    assert order_images(paired, index)["image_id"].tolist() == ["0001", "0000", "0002"]


def crops(cohort, **settings):
    store = VolumeStore(cohort)
    values = {"size": (8, 8, 8), "spacing_mm": None, "window": "wide", "seed": 3} | settings
    return Crops(store, list(store.index["image_id"]), **values), store


def test_a_crop_is_decided_by_seed_epoch_and_image(ct_ehr_cohort):
    made, store = crops(ct_ehr_cohort)
    names = list(store.index["image_id"])[:3]
    together = made.voxels(names, [4, 4, 5])
    assert torch.equal(together[1], made.voxels([names[1]], [4])[0])
    assert not torch.equal(together[1], made.voxels([names[1]], [5])[0])
    assert not torch.equal(together[1], crops(ct_ehr_cohort, seed=4)[0].voxels([names[1]], [4])[0])
    middle = windowed(store.crop_hu(names[1], (8, 8, 8)))
    assert torch.equal(made.voxels([names[1]])[0], torch.from_numpy(middle))


@pytest.mark.parametrize(("spacing_mm", "edge", "covers"), [(None, 8, 1 / 64), ((2.0, 2.0, 2.0), 16, 1 / 8)])
def test_what_a_crop_covers_is_told_in_mm_and_as_a_part_of_the_volume(ct_ehr_cohort, spacing_mm, edge, covers):
    made, _ = crops(ct_ehr_cohort, spacing_mm=spacing_mm)
    assert made.report == {"crop_mm": [edge] * 3, "crop_covers": pytest.approx(covers, abs=1e-4)}
    lines = say_images(made.report | {"several_images": 0}, chosen_by=())
    assert f"{edge} x {edge} x {edge} mm, {100 * covers:.3g} %" in lines[0]
    assert ["warning" in line for line in lines] == ([False, True] if covers < 0.05 else [False])


def test_crops_of_coarser_voxels_see_more(ct_ehr_cohort):
    coarse, store = crops(ct_ehr_cohort, spacing_mm=(4.0, 4.0, 4.0))
    image = store.index["image_id"].iloc[0]
    whole = windowed(np.asarray(store.hu(image)))
    assert coarse.report["crop_covers"] == 1
    assert float(coarse.voxels([image]).mean()) == pytest.approx(float(whole.mean()), abs=0.03)


@pytest.mark.parametrize(("chosen_by", "rule"), [((), "thinnest slices"), (("B30f", "B70f"), "B30f, B70f")])
def test_dates_of_several_images_are_counted_and_the_kernels_taken_told(chosen_by, rule):
    report = {"crop_mm": [1, 1, 1], "crop_covers": 1.0, "several_images": 2, "kernels": {"B30f": 3, "not told": 1}}
    _, line = say_images(report, chosen_by=chosen_by)
    assert line.startswith("2 dates have several images")
    assert rule in line
    assert "B30f 3, not told 1" in line
