"""Batches of windowed crops out of a store."""

import pickle

import nibabel as nib
import numpy as np
import pytest
import torch

from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.boxes import Box
from mmjepa.ct.crop import random_centre
from mmjepa.ct.ingest import ingest_images
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


def test_what_is_unknown_or_empty_is_refused_before_the_first_batch(store):
    for options, code in (({"windows": ("bone",)}, "WINDOW_UNKNOWN"), ({"batch": 0}, "BATCH_EMPTY")):
        with pytest.raises(Refusal, match=code):
            batches(store, **options)
    with pytest.raises(Refusal, match="IMAGE_UNKNOWN"):
        VolumeBatches(store, ["none"], size=SIZE, batch=1, seed=0)
    image = store.index["image_id"][0]
    with pytest.raises(Refusal, match="CROP_OUTSIDE"):
        batches(store, centres={image: (50.0, 0.0, 0.0)})
    for low, high in (((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (2, 2, 11))):
        with pytest.raises(Refusal, match="BOX_OUTSIDE"):
            batches(store, boxes={image: [Box("A", low, high)]})
    with pytest.raises(Refusal, match="BATCH_EMPTY"):
        VolumeBatches(store, [], size=SIZE, batch=1, seed=0)
