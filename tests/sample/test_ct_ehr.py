"""Cells belong to their subject and date, and what is hidden is nowhere in the context."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from mmjepa.batch import SequenceView, VolumeView
from mmjepa.cohort import Cohort
from mmjepa.config import build
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.window import windowed
from mmjepa.keyed import generator
from mmjepa.masking import CellMaskConfig, PatchMaskConfig, draw_cells
from mmjepa.refusal import Refusal
from mmjepa.sample import CtEhrViews, ct_ehr, open_sampler
from mmjepa.sample.ct_ehr import DAY_US, KINDS

MIXED = CellMaskConfig(
    probability={"cross_modal": 0.3, "temporal": 0.3, "random_cells": 0.2, "patches": 0.1, "events": 0.1}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fitted")


def opened(cohort, folder, splits=None, patch=8, **views):
    settings = {"crop": (16, 16, 16), "mask": MIXED} | views
    return open_sampler(
        CtEhrViews(**settings), Cohort.open(cohort), folder, patch=patch, language_model=None, seed=0, splits=splits
    )


class Followed(VolumeStore):
    """The store, in which two of three subjects have one or two earlier scans besides: their own scan, made brighter."""

    def __init__(self, cohort):
        super().__init__(cohort)
        subjects = sorted(self.index["subject_id"].unique())
        earlier = []
        for k in (1, 2):
            rows = self.index[self.index["subject_id"].map(subjects.index) % 3 >= k].copy()
            rows["image_id"] += f"@{k}"
            rows["time"] -= pd.Timedelta(days=200 * k)
            earlier.append(rows)
        self.index = pd.concat([self.index, *earlier], ignore_index=True)
        self._row_of = {image: n for n, image in enumerate(self.index["image_id"])}

    def hu(self, image_id):
        base, _, k = image_id.partition("@")
        return super().hu(base) + np.int16(10 * int(k or 0))


@pytest.fixture
def sampler(ct_ehr_cohort, folder, monkeypatch):
    monkeypatch.setattr(ct_ehr, "VolumeStore", Followed)
    made = opened(ct_ehr_cohort, folder)
    assert sorted({len(s.images) for s in made.subjects}) == [1, 2, 3]
    return made


def everything(sampler, epochs=3):
    return [(epoch, index) for epoch in range(epochs) for index in range(len(sampler))]


def same(a, b):
    """Whether two lists of views hold the same bits."""
    for x, y in zip(a, b, strict=True):
        for field in dataclasses.fields(x):
            one, two = getattr(x, field.name), getattr(y, field.name)
            if not (torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two):
                return False
    return True


def rows_of(views):
    """What each row of a latent table holds, as comparable bytes: voxels (and the places kept), or event tokens."""
    found = []
    for view in views:
        if isinstance(view, VolumeView):
            for i, crop in enumerate(view.voxels):
                if view.read == "cell":
                    found.append(("ct", crop.numpy().tobytes()))
                else:
                    found += [("ct", crop.numpy().tobytes(), int(place)) for place in view.keep[i]]
        else:
            for a, b in zip(view.offsets[:-1], view.offsets[1:], strict=True):
                parts = (view.tokens, view.values, view.has_value, view.days)
                found.append(("ehr", *(part[a:b].numpy().tobytes() for part in parts)))
    return found


def contents(batch, row):
    """The filled slots of a batch row: (kind, time, place, is target, what it holds)."""
    layout, seen, hidden = batch.layout, rows_of(batch.views), rows_of(batch.targets)
    slots = []
    for slot in torch.nonzero(layout.kind[row] >= 0)[:, 0].tolist():
        source, target = int(layout.source[row, slot]), int(layout.target[row, slot])
        assert (source >= 0) != (target >= 0)
        held = seen[source] if source >= 0 else hidden[target]
        place = tuple(layout.place[row, slot].tolist())
        slots.append((int(layout.kind[row, slot]), float(layout.time[row, slot]), place, target >= 0, held))
    return slots


def test_a_batch_of_items_is_the_items_one_by_one(sampler):
    items = everything(sampler)
    together = sampler.batch(items)
    for row, item in enumerate(items):
        alone = sampler.batch([item])
        assert contents(together, row) == contents(alone, 0)
        assert together.subjects[row] == alone.subjects[0]


def test_every_slot_holds_content_of_its_own_subject(sampler, monkeypatch):
    """Sentinel: every voxel and every token says whose it is."""
    owner = dict(zip(sampler.volumes.index["image_id"], sampler.volumes.index["subject_id"], strict=True))
    names = {subject: n for n, subject in enumerate(sorted(set(owner.values())))}
    for (subject, _), cell in sampler.encoded.items():
        cell["codes"] = np.full_like(cell["codes"], names[subject])

    def voxels(images, epochs):
        return torch.stack([torch.full((1, 16, 16, 16), float(names[owner[image]])) for image in images])

    monkeypatch.setattr(sampler.crops, "voxels", voxels)
    batch = sampler.batch(everything(sampler))
    kinds = set()
    for row, subject in enumerate(batch.subjects.tolist()):
        for kind, _, _, target, held in contents(batch, row):
            dtype = np.float32 if held[0] == "ct" else np.int64
            assert set(np.frombuffer(held[1], dtype).tolist()) == {names[subject]}
            kinds.add((KINDS[kind], target))
    assert kinds == {(kind, target) for kind in KINDS for target in (False, True)}


def test_cells_hold_the_scan_and_the_events_of_their_own_subject_and_interval(sampler, ct_ehr_cohort):
    files = sorted((ct_ehr_cohort / "ehr" / "data").rglob("*.parquet"))
    events = pd.concat([pd.read_parquet(file) for file in files])
    times = sampler.volumes.index.set_index("image_id")
    for subject in sampler.subjects:
        own = events[(events["subject_id"] == subject.subject_id) & events["time"].notna()]
        own_us = own["time"].to_numpy().astype("datetime64[us]").astype(np.int64)
        since = subject.times_us[0] - round(sampler.config.history_days * DAY_US)
        for date, end in enumerate(subject.times_us.tolist()):
            image = subject.images[date]
            assert int(times.loc[image, "subject_id"]) == subject.subject_id
            crop = windowed(sampler.volumes.crop_hu(image, (16, 16, 16)), ("wide",))
            assert torch.equal(sampler.crops.voxels([image])[0], torch.from_numpy(crop))
            cell = sampler.encoded[subject.subject_id, date]
            timed = cell["days"][cell["days"] != 0]
            ages = (own_us[(own_us > since) & (own_us <= end)] - end) / DAY_US
            assert len(cell["codes"]) <= sampler.config.max_events
            assert (cell["days"] <= 0).all()
            for day in timed:
                assert np.abs(ages - day).min() < 1e-3
            since = end


def test_events_after_a_date_never_reach_its_cell(ct_ehr_cohort, sampler):
    """Scramble all that is later, or becomes available later: not one bit of the cell moves; then the past: it does."""
    rng, store = np.random.default_rng(0), sampler.events
    moved = 0
    for subject in sampler.subjects[:6]:
        row = store.row(subject.subject_id)
        span = np.arange(store.offsets[row], store.offsets[row + 1])
        before = subject.times_us[0] - round(sampler.config.history_days * DAY_US)
        for date, end in enumerate(subject.times_us.tolist()):
            for late in (True, False):
                known = (np.asarray(store.times_us[span]) <= end) & (np.asarray(store.available_us[span]) <= end)
                chosen = span[~known if late else known]
                codes, values = np.array(store.codes), np.array(store.values)
                codes[chosen] = rng.integers(0, len(store.vocabulary), len(chosen))
                values[chosen] = rng.normal(size=len(chosen))
                sampler.events = dataclasses.replace(store, codes=codes, values=values)
                cell = sampler._encode(subject.subject_id, int(before), end)
                kept = sampler.encoded[subject.subject_id, date]
                equal = all(np.array_equal(cell[name], kept[name]) for name in kept)
                assert equal or not late
                moved += not equal
            before = end
    assert moved


def test_replacing_hidden_content_leaves_the_context_bit_identical(sampler):
    items, compared = everything(sampler), 0
    for epoch, index in items:
        subject = sampler.subjects[index]
        mask = draw_cells(subject.present, generator(0, "mask", epoch, subject.subject_id), MIXED)
        if mask.mode in ("patches", "events"):
            continue
        before = sampler.batch([(epoch, index)])
        kept = {key: dict(cell) for key, cell in sampler.encoded.items()}
        crops = sampler.crops
        for date in np.flatnonzero(mask.target[:, 1]):
            cell = sampler.encoded[subject.subject_id, int(date)]
            cell["codes"], cell["values"] = cell["codes"][::-1].copy() * 0, cell["values"] + 9
        hidden = {subject.images[date] for date in np.flatnonzero(mask.target[:, 0])}
        sampler.crops = Noisy(crops, hidden)
        after = sampler.batch([(epoch, index)])
        sampler.crops, sampler.encoded = crops, kept
        assert same(before.views, after.views)
        assert not same(before.targets, after.targets)
        for field in dataclasses.fields(before.layout):
            assert torch.equal(getattr(before.layout, field.name), getattr(after.layout, field.name))
        compared += 1
    assert compared > len(sampler)


class Noisy:
    """Crops that are noise for some images."""

    def __init__(self, crops, images):
        self.crops, self.images = crops, images

    def voxels(self, images, epochs):
        voxels = self.crops.voxels(images, epochs)
        noisy = torch.tensor([image in self.images for image in images])
        return torch.where(noisy[:, None, None, None, None], torch.rand(voxels.shape), voxels)


def test_patches_split_one_scan_into_visible_and_hidden_places(ct_ehr_cohort, folder):
    sampler = opened(ct_ehr_cohort, folder, mask=CellMaskConfig(probability={"patches": 1.0}), crop=(32, 32, 32))
    batch = sampler.batch([(0, 0), (0, 1)])
    for row in range(2):
        slots = contents(batch, row)
        seen, hidden = ([s for s in slots if s[3] == target] for target in (False, True))
        assert len({s[4][1] for s in slots}) == 1  # one scan
        assert {s[0] for s in slots} == {KINDS.index("ct_patch")}
        assert not {s[4][2] for s in seen} & {s[4][2] for s in hidden}
        for _, _, place, _, held in slots:
            expected = np.array(np.unravel_index(held[2], (4, 4, 4))) / 3
            np.testing.assert_allclose(place, expected, atol=1e-6)
    assert batch.views[0].keep.shape == (2, 16)


def test_tokens_that_are_stacks_of_slices_are_hidden_and_placed_along_z(ct_ehr_cohort, folder):
    settings = {"mask": CellMaskConfig(probability={"patches": 1.0}), "patches": PatchMaskConfig(block=0.25)}
    sampler = opened(ct_ehr_cohort, folder, patch=(None, None, 2), **settings)
    assert sampler.grid == (1, 1, 8)
    batch = sampler.batch([(0, 0), (0, 1)])
    assert batch.views[0].keep.shape == (2, 2)
    for row in range(2):
        slots = contents(batch, row)
        assert [place for _, _, place, _, _ in slots] == [(0.0, 0.0, pytest.approx(s[4][2] / 7)) for s in slots]
        seen, hidden = ({s[4][2] for s in slots if s[3] == target} for target in (False, True))
        assert len(seen) == 2
        assert 2 <= len(hidden) <= 4
        assert not seen & hidden


def test_days_are_counted_from_the_latest_date_in_the_context(sampler):
    """So that a forecast is not told by its context's clock that there will be a follow-up."""
    found = 0
    for item in everything(sampler):
        slots = contents(sampler.batch([item]), 0)
        seen = [s[1] for s in slots if not s[3]]
        assert max(seen) == 0
        subject = sampler.subjects[item[1]]
        gaps = {round(float(a - b) / DAY_US, 3) for a in subject.times_us.tolist() for b in subject.times_us.tolist()}
        assert all(min(abs(s[1] - gap) for gap in gaps) < 0.01 for s in slots)
        found += any(s[3] and s[1] > 0 for s in slots)
    assert found


def test_events_that_are_hidden_in_a_cell_are_the_others_of_the_same_cell(ct_ehr_cohort, folder):
    sampler = opened(ct_ehr_cohort, folder, mask=CellMaskConfig(probability={"events": 1.0}))
    for item in everything(sampler, 1):
        batch = sampler.batch([item])
        if batch.notes["skipped"]:
            continue
        (seen,), (hidden,) = batch.views, batch.targets
        subject = sampler.subjects[item[1]].subject_id
        cells = [cell for (owner, _), cell in sampler.encoded.items() if owner == subject]
        joined = sorted(
            zip([*seen.tokens.tolist(), *hidden.tokens.tolist()], [*seen.days.tolist(), *hidden.days.tolist()])  # noqa: B905
        )
        assert joined in [sorted(zip(c["codes"].tolist(), c["days"].tolist(), strict=True)) for c in cells]
        assert seen.rows == hidden.rows == 1


def test_embedding_rows_are_every_scan_once_with_its_record(sampler):
    keys, cells = [], 0
    for frame, views, present in sampler.embedding_batches(size=5):
        assert views[0].rows == len(frame)
        assert sum(isinstance(v, SequenceView) and v.rows for v in views) == present.sum()
        keys.append(frame)
        cells += int(present.sum())
    frame = pd.concat(keys)
    assert sorted(frame["image_id"]) == sorted(image for s in sampler.subjects for image in s.images)
    assert cells == sum(int(s.present[:, 1].sum()) for s in sampler.subjects)


def test_splits_are_kept_apart_and_tokens_fitted_once(ct_ehr_cohort, folder, sampler):
    before = (folder / "tokens.json").read_bytes()
    splits = Cohort.open(ct_ehr_cohort).events().splits
    train = opened(ct_ehr_cohort, folder, splits=("train",))
    assert {s.subject_id for s in train.subjects} <= set(splits["train"].tolist())
    assert len(train) < len(sampler)
    assert (folder / "tokens.json").read_bytes() == before


def test_records_without_splits_are_all_used(ct_ehr_cohort, folder):
    cohort = Cohort.open(ct_ehr_cohort)
    cohort.events().splits.clear()
    views = CtEhrViews(crop=(16, 16, 16))
    made = open_sampler(views, cohort, folder, patch=8, language_model=None, seed=0, splits=("train",))
    assert len(made) == len(opened(ct_ehr_cohort, folder))


@pytest.mark.parametrize(("patch", "crop"), [(8, (20, 16, 16)), ((None, None, 3), (20, 16, 16))])
def test_a_token_that_does_not_fit_is_refused(ct_ehr_cohort, folder, patch, crop):
    with pytest.raises(Refusal) as refused:
        opened(ct_ehr_cohort, folder, patch=patch, crop=crop)
    assert refused.value.code == "CONFIG_VALUE"
    assert "views.crop" in refused.value.message


class Reconstructed(VolumeStore):
    """The store, in which every scan was reconstructed twice: two images of one moment."""

    def __init__(self, cohort):
        super().__init__(cohort)
        again = self.index.assign(image_id=self.index["image_id"] + "@1")
        self.index = pd.concat([self.index, again], ignore_index=True)
        self._row_of = {image: n for n, image in enumerate(self.index["image_id"])}

    def hu(self, image_id):
        return super().hu(image_id.partition("@")[0])


def test_reconstructions_of_one_scan_are_drawn_from_and_make_no_date_of_their_own(ct_ehr_cohort, folder, monkeypatch):
    monkeypatch.setattr(ct_ehr, "VolumeStore", Reconstructed)
    sampler, seen = opened(ct_ehr_cohort, folder), []
    assert all(len(s.scans) == 1 and len(s.scans[0]) == 2 for s in sampler.subjects)
    monkeypatch.setattr(
        sampler.crops, "voxels", lambda images, _=None: seen.extend(images) or torch.zeros(len(images), 1, 16, 16, 16)
    )
    sampler.batch(everything(sampler, epochs=8))
    drawn = {image.endswith("@1") for image in seen}
    assert drawn == {False, True}
    keys = pd.concat([frame for frame, _, _ in sampler.embedding_batches()])
    assert not keys.duplicated(["subject_id", "prediction_time"]).any()
    assert sampler.report["several_images"] == len(sampler)
    assert sampler.report["kernels"] == {"not told": len(sampler)}


def test_embedding_takes_the_preferred_kernel_and_says_which_were_taken(ct_ehr_cohort, folder, monkeypatch):
    class Kernels(Reconstructed):
        def __init__(self, cohort):
            super().__init__(cohort)
            self.index["kernel"] = ["B70f" if image.endswith("@1") else "B30f" for image in self.index["image_id"]]

    monkeypatch.setattr(ct_ehr, "VolumeStore", Kernels)
    for prefer, taken in (((), "B30f"), (("b70f",), "B70f"), (("FC01", "B30f", "B70f"), "B30f")):
        sampler = opened(ct_ehr_cohort, folder, prefer_kernel=prefer)
        (frame, _, _), *_ = sampler.embedding_batches()
        assert set(frame["image_id"].str.endswith("@1")) == {taken == "B70f"}
        assert sampler.report["kernels"] == {taken: len(sampler)}


def test_training_reads_another_crop_in_every_epoch_and_embedding_the_middle(ct_ehr_cohort, folder):
    sampler = opened(ct_ehr_cohort, folder, mask=CellMaskConfig(probability={"patches": 1.0}))
    crops = [sampler.batch([(epoch, 0)]).views[0].voxels for epoch in range(3)]
    assert torch.equal(
        crops[0], opened(ct_ehr_cohort, folder, mask=sampler.config.mask).batch([(0, 0)]).views[0].voxels
    )
    assert not torch.equal(crops[0], crops[1])
    for crop in crops:
        assert crop.min() >= 0
        assert 0 < crop.max() <= 1
    image = sampler.subjects[0].images[0]
    middle = windowed(sampler.volumes.crop_hu(image, (16, 16, 16)))
    _, views, _ = next(sampler.embedding_batches())
    assert torch.equal(views[0].voxels[0], torch.from_numpy(middle))


@pytest.mark.parametrize("edge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_spacing_that_is_no_length_is_refused(edge):
    with pytest.raises(ValueError, match="spacing_mm"):
        CtEhrViews(spacing_mm=(1.0, edge, 1.0))


def test_a_window_is_a_name_or_a_pair_of_hu(ct_ehr_cohort, folder):
    named, pair = (opened(ct_ehr_cohort, folder, window=window) for window in ("lung", (-1350, 150)))
    assert torch.equal(*(s.crops.voxels([s.subjects[0].images[0]]) for s in (named, pair)))
    assert build(CtEhrViews, {"window": [-1350, 150]}) == CtEhrViews(window=(-1350, 150))
    for wrong in ("long", [150, -1350], [-1000]):
        with pytest.raises(Refusal) as refused:
            build(CtEhrViews, {"window": wrong})
        assert refused.value.code.startswith("CONFIG_")


def test_a_run_pairs_as_its_config_says(ct_ehr_cohort, folder, monkeypatch):
    monkeypatch.setattr(ct_ehr, "VolumeStore", Followed)
    views = build(CtEhrViews, {"kind": "ct_ehr", "crop": [16, 16, 16], "pairing": {"scans": "last"}})
    every = opened(ct_ehr_cohort, folder)
    last = opened(ct_ehr_cohort, folder, pairing=views.pairing)
    assert max(len(subject.times_us) for subject in every.subjects) == 3
    assert {len(subject.times_us) for subject in last.subjects} == {1}
    assert [s.times_us[-1] for s in last.subjects] == [s.times_us[-1] for s in every.subjects]
    assert last.report["unmatched"]["other_scan_taken"] > 0


@pytest.mark.parametrize(
    "pairing", [{"rule": "as_of_order"}, {"rule": "soon"}, {"window_days": -1}, {"scans": "nearest"}]
)
def test_a_pairing_that_is_none_is_refused_with_the_config(pairing):
    with pytest.raises(Refusal, match="CONFIG"):
        build(CtEhrViews, {"kind": "ct_ehr", "pairing": pairing})


def test_large_subject_ids_are_found_where_a_split_is_absent(ct_ehr_cohort, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(ct_ehr.CtEhrSampler, "_subjects", lambda self, paired, wanted: seen.append(wanted.dtype) or [])
    with pytest.raises(Refusal, match="COHORT_UNPAIRED"):
        opened(ct_ehr_cohort, folder, splits=("train", "no such split"))
    assert seen == [np.int64]  # a float would round ids above 2^53 to those of other people
