"""Batches of windowed crops out of a store."""

import pickle

import nibabel as nib
import numpy as np
import pytest
import torch

from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.boxes import Box
from mmjepa.ct.ingest import ingest_images
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import windowed
from mmjepa.identity import Crosswalk
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
    with pytest.raises(Refusal, match="BATCH_EMPTY"):
        VolumeBatches(store, [], size=SIZE, batch=1, seed=0)
