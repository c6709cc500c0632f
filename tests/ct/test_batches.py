"""Batches of windowed crops out of a store."""

import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.boxes import Box
from mmjepa.ct.crop import random_centre
from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.resample import crop_mm
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import WINDOWS_HU, windowed
from mmjepa.identity import Crosswalk
from mmjepa.keyed import generator, key_words
from mmjepa.refusal import Refusal

SIZE = (8, 8, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Seven volumes, one of them shorter than the crops."""
    folder = tmp_path_factory.mktemp("batches")
    (folder / "source").mkdir()
    lines = ["file,patient_id,time"]
    for n in range(7):
        hu = np.random.default_rng(n).integers(-1000, 1000, (12, 11, 10 if n else 5)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.eye(4)), folder / "source" / f"{n}.nii")
        lines.append(f"{n}.nii,P{n},")
    (folder / "source" / "images.csv").write_text("\n".join(lines) + "\n")
    ingest_images(folder / "source", folder / "cohort", crosswalk=Crosswalk.none("a salt for tests"))
    return VolumeStore(folder / "cohort")


def batches(store, **options):
    return VolumeBatches(store, list(store.index["image_id"]), **{"size": SIZE, "batch": 3, "seed": 0} | options)


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own(store):
    made = batches(store)
    epochs = [[image for batch in made.epoch(n) for image in batch.images] for n in range(3)]
    assert all(sorted(images) == sorted(store.index["image_id"]) for images in epochs)
    assert len({tuple(images) for images in epochs}) > 1
    assert [len(batch.images) for batch in made.epoch(0)] == [3, 3, 1]
    assert len(made) == 3


def test_a_sample_is_the_same_whatever_the_batch_or_process_and_differs_by_epoch_and_seed(store):
    def samples(made, epoch=0):
        return {i: v for b in made.epoch(epoch) for i, v in zip(b.images, b.voxels, strict=True)}

    base = samples(batches(store))
    for other in (batches(store, batch=1), pickle.loads(pickle.dumps(batches(store, batch=7)))):
        again = samples(other)
        assert all(torch.equal(base[image], again[image]) for image in base)
    for other in (samples(batches(store), 1), samples(batches(store, seed=1))):
        assert any(not torch.equal(base[image], other[image]) for image in base)


def test_voxels_are_windows_of_a_crop_of_their_image_and_padding_is_masked(store):
    padded = 0
    for batch in batches(store, windows=("wide", "lung")).epoch(0):
        assert batch.voxels.shape == (len(batch.images), 2, *SIZE)
        assert batch.valid.shape == (len(batch.images), 1, *SIZE)
        for image, voxels, valid in zip(batch.images, batch.voxels.numpy(), batch.valid.numpy(), strict=True):
            known = windowed(np.asarray(store.hu(image)), ("wide",))
            assert np.isin(voxels[0][valid[0]], known).all()
            assert (
                voxels[:, ~valid[0]] == windowed(np.full((1, 1, 1), -1000, np.int16), ("wide", "lung"))[:, 0, 0]
            ).all()
            padded += (~valid).any()
            assert (~valid).any() == (min(store.shape(image)) < 8)
    assert padded == 1


def test_every_bit_is_the_crop_of_the_drawn_place_then_windowed_then_transformed(store):
    """The reference: a fresh array for every step, float arithmetic as the window is defined."""
    from monai.transforms import RandFlip

    names, size, flipped = ("lung", "wide", "dsb"), (6, 9, 7), 0
    for transform in (None, RandFlip(prob=0.5, spatial_axis=(0, 2))):
        made = batches(store, size=size, windows=names, transform=transform)
        for epoch, batch in ((number, batch) for number in range(3) for batch in made.epoch(number)):
            for image, got, valid in zip(batch.images, batch.voxels.numpy(), batch.valid.numpy(), strict=True):
                rng = generator(0, "crop", epoch, image)
                crop = store.crop(image, size, random_centre(store.shape(image), size, rng))
                want = np.stack(
                    [
                        (np.clip(crop.hu, low, high) - low).astype(np.float32) / np.float32(high - low)
                        for low, high in (WINDOWS_HU[name] for name in names)
                    ]
                )
                state = np.random.RandomState(key_words(0, "transform", epoch, image)[0])
                if transform and state.rand() < 0.5:
                    want, flipped = want[:, ::-1, :, ::-1], flipped + 1
                np.testing.assert_array_equal(got, want)
                np.testing.assert_array_equal(valid[0], crop.valid)
    assert 0 < flipped < 21


def test_batches_that_are_kept_do_not_change_when_later_ones_are_made(store):
    from monai.transforms import RandFlip

    for transform in (None, RandFlip(prob=0.5)):
        made = batches(store, transform=transform, batch=2)
        kept = [(batch, batch.voxels.clone()) for batch in made.epoch(0)]
        list(made.epoch(1))
        assert all(torch.equal(batch.voxels, as_made) for batch, as_made in kept)


def test_a_given_centre_is_cropped_in_every_epoch(store):
    images = list(store.index["image_id"])
    centres = {image: store.centre(image, None) for image in images[:3]}
    made = batches(store, centres=centres)
    for image in images[:3]:
        crops = [made.sample(image, epoch)[0] for epoch in range(3)]
        want = torch.from_numpy(windowed(store.crop_hu(image, SIZE)))
        assert all(torch.equal(crop, want) for crop in crops)
    assert any(not torch.equal(made.sample(images[3], n)[0], made.sample(images[3], 0)[0]) for n in range(5))


def test_crops_hold_one_of_the_boxes_of_their_image(store):
    image = next(i for i in store.index["image_id"] if min(store.shape(i)) == 10)
    boxes = [Box("A", (0, 0, 0), (2, 2, 2)), Box("A", (10, 9, 8), (12, 11, 10))]
    made = VolumeBatches(store, [image], size=(4, 4, 4), batch=1, seed=0, boxes={image: boxes})
    ends = [
        windowed(
            np.array(store.hu(image)[box.low[0] : box.high[0], box.low[1] : box.high[1], box.low[2] : box.high[2]])
        )
        for box in boxes
    ]
    seen = set()
    for epoch in range(20):
        crop = made.sample(image, epoch)[0].numpy()
        seen.add(tuple(np.isin(end, crop).all() for end in ends))
    assert {(True, False), (False, True)} <= seen


def test_a_monai_transform_is_plugged_in_and_seeded_for_each_sample(store):
    from monai.transforms import Compose, RandFlip, RandGaussianNoise

    transform = Compose([RandFlip(prob=0.5, spatial_axis=0), RandGaussianNoise(prob=1.0)])
    plain = [batch.voxels for batch in batches(store).epoch(0)]
    first = [batch.voxels for batch in batches(store, transform=transform).epoch(0)]
    again = [batch.voxels for batch in batches(store, transform=transform, batch=2).epoch(0)]
    assert type(first[0]) is torch.Tensor
    assert not torch.equal(plain[0], first[0])
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(first[0][0] - plain[0][0], first[0][1] - plain[0][1])


def test_a_transform_may_change_the_shape_but_not_unequally(store):
    smaller = batches(store, transform=lambda voxels: voxels[:, ::2].numpy())
    assert next(iter(smaller.epoch(0))).voxels.shape == (3, 1, 4, 8, 8)
    sizes = iter(range(1, 8))
    for bad in (lambda voxels: voxels[:, : next(sizes)], lambda voxels: voxels[0]):
        with pytest.raises(Refusal, match="TRANSFORM_SHAPE"):
            list(batches(store, transform=bad).epoch(0))


@pytest.mark.parametrize(
    ("transform", "code"),
    [
        (lambda voxels: None, "TRANSFORM_OUTPUT: the transform returned a NoneType"),
        (lambda voxels: {"image": voxels}, "TRANSFORM_OUTPUT: the transform returned a dict of 1"),
        (lambda voxels: [voxels] * 4, "TRANSFORM_OUTPUT: the transform returned a list of 4"),
        (lambda voxels: voxels.nothing, "TRANSFORM_FAILED: the transform raised AttributeError"),
        (lambda voxels: 1 / 0, "TRANSFORM_FAILED: the transform raised ZeroDivisionError"),
    ],
)
def test_a_transform_that_fails_or_returns_no_array_is_refused_with_its_cause(store, transform, code):
    with pytest.raises(Refusal, match=code) as caught:
        list(batches(store, transform=transform).epoch(0))
    assert (caught.value.__cause__ is not None) == ("FAILED" in code)


def test_monai_transforms_of_dictionaries_and_of_several_crops_are_refused(store):
    from monai.transforms import Compose, RandFlip, RandFlipd, RandSpatialCropSamples

    for transform in (RandFlipd(["image"]), Compose([RandFlip(), Compose([RandFlipd(["image"])])])):
        with pytest.raises(Refusal, match=r"TRANSFORM_INVALID.*Take RandFlip$"):
            batches(store, transform=transform)
    several = batches(store, transform=RandSpatialCropSamples((4, 4, 4), 3, random_size=False))
    with pytest.raises(Refusal, match="TRANSFORM_OUTPUT: the transform returned a list of 3"):
        list(several.epoch(0))


def test_a_monai_transform_knows_the_spacing_and_place_of_the_crop(store):
    from monai.transforms import Lambda, Spacing

    finer = batches(store, spacing_mm=2.0, transform=Spacing((0.5, 1.0, 2.0)))
    shape = next(iter(finer.epoch(0))).voxels.shape
    assert shape == (3, 1, 29, 15, 8)  # 14 mm between the outermost centres, which MONAI keeps
    for spacing_mm in (None, (0.5, 0.75, 1.0)):
        seen = []
        made = batches(
            store,
            spacing_mm=spacing_mm,
            transform=Lambda(lambda voxels, seen=seen: seen.append(voxels.affine.numpy()) or voxels),
        )
        for image in store.index["image_id"]:
            crop = made.sample(image, 0)[1]
            np.testing.assert_allclose(seen[-1], crop.affine(store.affine(image)), atol=1e-12)
            np.testing.assert_allclose(np.diag(seen[-1]), [*(spacing_mm or (1, 1, 1)), 1])


@pytest.mark.parametrize("spacing_mm", [0.5, (2.0, 1.0, 0.7), 1.0])
def test_crops_of_a_given_spacing_are_those_of_the_resampler_and_padded_only_where_the_volume_is_short(
    store, spacing_mm
):
    wanted = (spacing_mm,) * 3 if isinstance(spacing_mm, float) else spacing_mm
    made = batches(store, spacing_mm=spacing_mm)
    for image, voxels, valid in (
        (i, v, m) for b in made.epoch(3) for i, v, m in zip(b.images, b.voxels, b.valid, strict=True)
    ):
        crop = made.sample(image, 3)[1]
        centre = tuple(a + (n - 1) / 2 * step for a, n, step in zip(crop.start, SIZE, crop.step, strict=True))
        want = crop_mm(store, image, SIZE, wanted, centre)
        np.testing.assert_array_equal(voxels.numpy(), windowed(want))
        np.testing.assert_array_equal(valid[0], crop.valid)
        assert (want[~crop.valid] == -1000).all()
        for axis, (n, mm) in enumerate(zip(store.shape(image), wanted, strict=True)):
            assert valid[0].any(dim=[a for a in range(3) if a != axis]).all() == (7 * mm <= n)


def test_crops_of_the_own_spacing_are_those_without_a_spacing(store):
    for boxes in ({}, {image: [Box("A", (1, 2, 0), (3, 4, 3))] for image in store.index["image_id"]}):
        plain, same = batches(store, boxes=boxes), batches(store, boxes=boxes, spacing_mm=1.0)
        for one, other in zip(plain.epoch(0), same.epoch(0), strict=True):
            assert torch.equal(one.voxels, other.voxels)
            assert torch.equal(one.valid, other.valid)


@given(data=st.data(), spacing_mm=st.tuples(*[st.floats(0.4, 1.3)] * 3), epoch=st.integers(0, 1000))
def test_a_crop_of_any_spacing_holds_its_box_and_stays_inside(store, data, spacing_mm, epoch):
    image = next(i for i in store.index["image_id"] if min(store.shape(i)) == 10)
    lengths = [int(8 * mm) for mm in spacing_mm]
    low = tuple(data.draw(st.integers(0, n - 1)) for n in store.shape(image))
    high = tuple(
        data.draw(st.integers(a + 1, min(n, a + length)))
        for a, n, length in zip(low, store.shape(image), lengths, strict=True)
    )
    made = VolumeBatches(
        store, [image], size=8, batch=1, seed=0, spacing_mm=spacing_mm, boxes={image: [Box("A", low, high)]}
    )
    crop = made.sample(image, epoch)[1]
    for first, step, a, b, n in zip(crop.start, crop.step, low, high, store.shape(image), strict=True):
        edge = first - step / 2, first + 7.5 * step
        assert edge[0] <= a - 0.5 + 1e-9
        assert edge[1] >= b - 0.5 - 1e-9
        if 8 * step <= n:
            assert edge[0] >= -0.5 - 1e-9
            assert edge[1] <= n - 0.5 + 1e-9


def test_an_epoch_is_a_dataset_of_batches_the_same_with_workers_and_without(store):
    made = batches(store, size=8, transform=_halved)
    alone = list(made.epoch(1))
    used = made.epoch(1)
    used[0]
    for loaded in (
        list(DataLoader(made.epoch(1), batch_size=None)),
        list(DataLoader(used, batch_size=None, num_workers=2)),
        list(pickle.loads(pickle.dumps(used))),
    ):
        assert [batch.images for batch in loaded] == [batch.images for batch in alone]
        assert all(torch.equal(one.voxels, other.voxels) for one, other in zip(loaded, alone, strict=True))
        assert all(torch.equal(one.valid, other.valid) for one, other in zip(loaded, alone, strict=True))
    with pytest.raises(IndexError):
        made.epoch(1)[3]


def _halved(voxels):
    return voxels / 2


def test_an_image_listed_several_times_gives_crops_of_its_own(store):
    image = next(i for i in store.index["image_id"] if min(store.shape(i)) == 10)
    made = VolumeBatches(store, [image] * 4, size=(4, 4, 4), batch=4, seed=0)
    (batch,) = made.epoch(0)
    assert len({crop.numpy().tobytes() for crop in batch.voxels}) == 4
    singles = {made.sample(image, 0, mention)[0].numpy().tobytes() for mention in range(4)}
    assert {crop.numpy().tobytes() for crop in batch.voxels} == singles


def test_images_without_a_box_are_counted(store):
    images = list(store.index["image_id"])
    assert batches(store).unboxed == 7
    assert batches(store, boxes={images[0]: [Box("A", (0, 0, 0), (2, 2, 2))], images[1]: []}).unboxed == 6
    assert VolumeBatches(store, images[:1] * 3, size=4, batch=1, seed=0, boxes={images[1]: []}).unboxed == 1


def test_what_is_unknown_or_empty_is_refused_before_the_first_batch(store):
    for options, code in (
        ({"windows": ("bony",)}, "WINDOW_UNKNOWN"),
        ({"batch": 0}, "BATCH_EMPTY"),
        ({"spacing_mm": 0.0}, "SPACING_INVALID"),
        ({"boxes": {"none": []}}, "IMAGE_UNKNOWN"),
        ({"centres": {"none": (1, 1, 1)}}, "IMAGE_UNKNOWN"),
        ({"transform": "flip"}, "TRANSFORM_INVALID"),
    ):
        with pytest.raises(Refusal, match=code):
            batches(store, **options)
    with pytest.raises(Refusal, match="IMAGE_UNKNOWN"):
        VolumeBatches(store, ["none"], size=SIZE, batch=1, seed=0)
    image = store.index["image_id"][0]
    with pytest.raises(Refusal, match="CROP_OUTSIDE"):
        batches(store, centres={image: (50.0, 0.0, 0.0)})
    for wrong in ((1, 2), "abc", None):
        with pytest.raises(Refusal, match="CENTRE_INVALID"):
            batches(store, centres={image: wrong})
    for wrong in ([((0, 0, 0), (2, 2, 2))], Box("A", (0, 0, 0), (2, 2, 2))):
        with pytest.raises(Refusal, match="BOX_INVALID"):
            batches(store, boxes={image: wrong})
    for low, high in (((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (2, 2, 11)), ((1, 1, 1), (1, 2, 2))):
        with pytest.raises(Refusal, match="BOX_OUTSIDE"):
            batches(store, boxes={image: [Box("A", low, high)]})
    with pytest.raises(Refusal, match="BATCH_EMPTY"):
        VolumeBatches(store, [], size=SIZE, batch=1, seed=0)
