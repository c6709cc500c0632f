"""A batch holds what a slow reading of the files says it must, for every flag, and of its own subjects alone."""

import importlib
import pickle
import sys
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch.utils.data import DataLoader

from mmjepa.ehr.batches import BatchesConfig, EventBatch, EventBatches
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.tokens import FIRST, PAD, JointTokens, TokensConfig
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
FOLDER = Path(__file__).parents[2] / "benchmarks"
CODES = ["LAB//A", "LAB//B", "LAB//C", "DRUG", "MEDS_DEATH", "CT//CHEST", "RARE"]


@pytest.fixture(scope="module")
def slow():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("ehr_parts.reference")
    sys.path.remove(str(FOLDER))


def write_root(root, rows, shards=2, order=1):
    """rows: (subject, hour or nan, hour when available or nan, code, value, image or None), each subject's by time."""
    names = ["subject_id", "time", "available_time", "code", "numeric_value", "image_id"]
    frame = pd.DataFrame(rows, columns=names)
    for name in ("time", "available_time"):
        frame[name] = pd.to_datetime(frame[name] * HOUR_US, unit="us").astype("datetime64[us]")
    frame["numeric_value"] = frame["numeric_value"].astype(np.float32)
    for part in ("data", "metadata"):
        (root / part).mkdir(parents=True)
    for number, people in enumerate(np.array_split(frame["subject_id"].unique()[::order], shards)):
        parts = [frame[frame["subject_id"] == person] for person in people]
        pd.concat(parts).to_parquet(root / "data" / f"{number}.parquet", index=False)
    pd.DataFrame({"code": frame["code"].unique()}).to_parquet(root / "metadata" / "codes.parquet")
    return root


def world(subjects=120, seed=0):
    """Records of 0 to 40 events with ties, late rows, missing values, images and codes that give no token."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject in (np.arange(subjects) * 7 - 30).tolist():
        rows += [(subject, np.nan, np.nan, "SEX//F", np.nan, None)] * int(rng.integers(0, 3))
        rows += [(subject, np.nan, np.nan, "LAB//A", rng.normal(), None)] * int(rng.integers(0, 5) == 0)
        for hour in np.sort(rng.integers(0, 200, rng.integers(0, 40))).tolist():
            late = hour + int(rng.integers(-2, 40)) if rng.random() < 0.4 else np.nan
            code = CODES[int(rng.choice(len(CODES), p=[0.3, 0.2, 0.2, 0.15, 0.06, 0.06, 0.03]))]
            value = np.nan if rng.random() < 0.4 else float(rng.normal())
            image = f"i{len(rows)}" if code.startswith("CT") or rng.random() < 0.05 else None
            rows.append((subject, hour, late, code, value, image))
        rows += [] if rows and rows[-1][0] == subject else [(subject, 1, np.nan, "DRUG", np.nan, None)]
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = write_root(tmp_path_factory.mktemp("world") / "ehr", world())
    store = EventStore.build(root, root.parent / "store")
    tokens = JointTokens.fit(store, store.subjects[:60], TokensConfig(min_count=20, winsor=(0.1, 0.9)))
    return root, store, tokens


def asked(store, seed=0):
    """Every subject once or twice, at times before, inside and after its record."""
    rng = np.random.default_rng(seed)
    subjects = rng.permutation(np.concatenate([store.subjects, store.subjects[::3]]))
    return subjects, rng.integers(-5, 260, len(subjects)) * HOUR_US, rng.random(len(subjects)) < 0.3


@pytest.mark.parametrize("timed", [True, False])
def test_every_field_equals_the_slow_reading_for_every_flag(made, slow, timed):
    root, store, tokens = made
    reference = slow.Reference(slow.read_frame(root), tokens)
    subjects, times, labels = asked(store)
    batches = EventBatches(store, subjects, times if timed else None, tokens=tokens, labels=labels if timed else None)
    items = np.random.default_rng(1).permutation(len(batches))
    rows = 0
    for number, config in enumerate(slow.every_config(length=12)):
        batches.config = config
        some = items[number % 13 :: 13]  # every subject under many flags, every flag with many subjects
        assert slow.mismatches(batches, reference, some, epoch=number % 3) == 0, config
        rows += len(some)
    assert rows > 2000


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from(["end", "start", "random"]), st.integers(-40, 250))
def test_a_window_of_any_length_at_any_time_equals_the_slow_reading(slow, seed, length, window, hour):
    with tempfile.TemporaryDirectory() as folder:
        root = write_root(Path(folder) / "ehr", world(subjects=8, seed=seed))
        store = EventStore.in_memory(root)
        tokens = JointTokens.fit(store, store.subjects, TokensConfig(min_count=1, exclude=("LAB//A", "MEDS_DEATH")))
        reference = slow.Reference(slow.read_frame(root), tokens)
    config = BatchesConfig(length=length, window=window, hide=0.5, seed=seed, pad="left")
    times = np.full(len(store.subjects), hour * HOUR_US)
    batches = EventBatches(store, store.subjects, times, tokens=tokens, config=config)
    assert slow.mismatches(batches, reference, np.arange(len(batches)), epoch=seed) == 0


def test_the_slow_reading_notices_a_wrong_row(made, slow):
    root, store, tokens = made
    reference = slow.Reference(slow.read_frame(root), tokens)
    subjects, times, labels = asked(store)
    items = np.arange(len(subjects))
    other = EventBatches(store, subjects, times + 20 * HOUR_US, tokens=tokens, labels=~labels)
    other.prediction_times, other.labels = times, labels
    assert slow.mismatches(other, reference, items, epoch=0) > len(items) / 2


def test_every_row_holds_its_own_subjects_code_and_no_other(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(s, h, np.nan, f"S{s}", float(s), None) for s in range(300) for h in range(1 + s % 40)]
    rows = [(s, np.nan, np.nan, f"S{s}", float(s), None) for s in range(300)] + rows
    rows.sort(key=lambda row: row[0])
    store = EventStore.in_memory(write_root(tmp_path / "ehr", rows, shards=5))
    tokens = JointTokens.fit(store, store.subjects, TokensConfig(min_count=1))
    for window in ("end", "start", "random"):
        for static in ("prepend", "separate"):
            config = BatchesConfig(length=8, window=window, static=static)
            batches = EventBatches(store, rng.permutation(store.subjects), tokens=tokens, config=config)
            for batch in batches.epoch(0, 64):
                own = torch.tensor([FIRST + tokens.codes.index(f"S{s}") for s in batch.subjects.tolist()])[:, None]
                assert ((batch.codes == own) == batch.present).all()
                assert (batch.codes[~batch.present] == PAD).all()
                if batch.static_codes is not None:
                    assert (batch.static_codes == own).all()


def fields(batch: EventBatch) -> dict[str, np.ndarray]:
    return {name: column.numpy() for name, column in vars(batch).items() if column is not None}


def test_rows_do_not_depend_on_their_company_the_sharding_the_order_or_the_process(made, tmp_path):
    _, store, tokens = made
    again = EventStore.in_memory(write_root(tmp_path / "ehr", world(), shards=7, order=-1))
    subjects, times, labels = asked(store)
    config = BatchesConfig(length=12, window="random", hide=0.3, static="separate")
    one = EventBatches(store, subjects, times, tokens=tokens, labels=labels, config=config)
    order = np.random.default_rng(2).permutation(len(subjects))
    two = EventBatches(again, subjects[order], times[order], tokens=tokens, labels=labels[order], config=config)
    sent = pickle.loads(pickle.dumps(one))
    assert len(pickle.dumps(one)) < 20_000
    whole = fields(one.batch(np.arange(len(one)), epoch=4))
    for batches, place in ((two, np.argsort(order)), (sent, np.arange(len(one)))):
        for item in range(0, len(one), 5):
            alone = fields(batches.batch(place[[item, (item + 1) % len(one)]], epoch=4))
            for name, column in alone.items():
                mine, theirs = column[0], whole[name][item]
                assert mine.tobytes() == theirs[: len(mine)].tobytes() if mine.ndim else mine == theirs, name


def test_an_epoch_gives_every_item_once_in_a_keyed_order(made):
    _, store, tokens = made
    batches = EventBatches(store, store.subjects, tokens=tokens)
    first, again, other = ([batch.subjects.tolist() for batch in batches.epoch(number, 32)] for number in (0, 0, 1))
    assert first == again != other
    assert [len(rows) for rows in first] == [32, 32, 32, len(store.subjects) - 96]
    assert sorted(chain.from_iterable(other)) == store.subjects.tolist()
    kept = [batch.subjects.tolist() for batch in batches.epoch(0, 32, shuffle=False)]
    assert list(chain.from_iterable(kept)) == store.subjects.tolist()


def test_a_data_loader_reads_an_epoch_by_number_with_and_without_workers(made):
    _, store, tokens = made
    config = BatchesConfig(length=6, window="random", hide=0.3)
    batches = EventBatches(store, store.subjects, tokens=tokens, config=config)
    epoch = batches.epoch(2, 50)
    alone = [fields(batch) for batch in epoch]
    assert len(epoch) == len(alone) == 3
    assert fields(epoch[1])["codes"].tobytes() == alone[1]["codes"].tobytes()
    for workers in (0, 2):
        loaded = DataLoader(batches.epoch(2, 50), batch_size=None, num_workers=workers)
        assert len(loaded) == 3
        for batch, mine in zip(loaded, alone, strict=True):
            assert {name: column.tobytes() for name, column in fields(batch).items()} == {
                name: column.tobytes() for name, column in mine.items()
            }
    for beyond in (3, -1):
        with pytest.raises(IndexError, match="of 3"):
            epoch[beyond]
    with pytest.raises(Refusal, match="BATCH_EMPTY"):
        batches.epoch(0, 0)


def test_random_windows_start_everywhere_equally_often_and_events_are_hidden_as_often_as_told(tmp_path):
    """A window of 4 in 20 events starts at 0..16; 30 % of events are hidden, each alike."""
    rows = [(s, h, np.nan, "LAB//A", float(h), None) for s in range(200) for h in range(20)]
    store = EventStore.in_memory(write_root(tmp_path / "ehr", rows))
    tokens = JointTokens.fit(store, store.subjects)
    config = BatchesConfig(length=4, window="random", hide=0.3)
    batches = EventBatches(store, store.subjects, tokens=tokens, config=config)
    starts, hidden = np.zeros(17), np.zeros(20)
    seen = np.zeros(20)
    for epoch in range(100):
        batch = batches.batch(np.arange(200), epoch)
        np.add.at(starts, batch.first.numpy(), 1)
        at = batch.first.numpy()[:, None] + np.arange(4)
        np.add.at(seen, at, 1)
        np.add.at(hidden, at[batch.hidden.numpy()], 1)

    def fits(observed, expected):
        return ((observed - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, len(observed) - 1)

    assert fits(starts, np.full(17, 20_000 / 17))
    assert fits(hidden, 0.3 * seen)
    assert fits(seen - hidden, 0.7 * seen)
    pairs = np.corrcoef(batch.hidden.numpy().astype(float), rowvar=False)
    assert np.abs(pairs - np.eye(4)).max() < 0.35  # hidden each by itself


def test_what_becomes_known_after_the_prediction_time_changes_no_bit(made, tmp_path):
    _, store, tokens = made
    t = 100
    changed = [
        row if (row[1] if row[2] != row[2] else row[2]) <= t or row[1] != row[1] else (*row[:3], "DRUG", 99.0, None)
        for row in world()
    ]
    other = EventStore.in_memory(write_root(tmp_path / "ehr", changed))
    times = np.full(len(store.subjects), t * HOUR_US)
    config = BatchesConfig(window="random", length=6, hide=0.2)
    one, two = (EventBatches(s, store.subjects, times, tokens=tokens, config=config) for s in (store, other))
    items = np.arange(len(one))
    for name, column in fields(one.batch(items)).items():
        assert column.tobytes() == fields(two.batch(items))[name].tobytes()
    later = EventBatches(other, store.subjects, times + 50 * HOUR_US, tokens=tokens, config=config)
    assert later.batch(items).codes.shape != one.batch(items).codes.shape or not torch.equal(
        later.batch(items).codes, one.batch(items).codes
    )


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_prediction_times_of_any_unit_see_the_same_past(made, unit):
    _, store, tokens = made
    times = np.full(len(store.subjects), 40 * HOUR_US)
    asked_for = pd.Series(times.astype("datetime64[us]").astype(f"datetime64[{unit}]"))
    items = np.arange(len(times))
    one, two = (EventBatches(store, store.subjects, t, tokens=tokens) for t in (times, asked_for))
    for name, column in fields(one.batch(items)).items():
        assert column.tobytes() == fields(two.batch(items))[name].tobytes(), name
    with pytest.raises(Refusal, match="TIME_TYPE"):
        EventBatches(store, store.subjects, times.astype(float), tokens=tokens)


def test_bad_requests_are_refused(made):
    _, store, tokens = made
    with pytest.raises(Refusal, match="SUBJECT_UNKNOWN"):
        EventBatches(store, np.array([10**9]), tokens=tokens)
    with pytest.raises(ValueError, match="2 labels for 1 subjects"):
        EventBatches(store, store.subjects[:1], tokens=tokens, labels=np.zeros(2))
    for wrong in ({"length": 0}, {"hide": 1.0}, {"hide": -0.1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            replace(BatchesConfig(), **wrong)


@pytest.mark.real_data
def test_windows_of_the_mimic_demo_equal_the_slow_reading(data_folder, slow):
    root = data_folder / "mimic_iv_demo_meds"
    store = EventStore.in_memory(root)
    tokens = JointTokens.fit(store, store.splits["train"])
    people = np.asarray(store.subjects)[::5]
    rows = store.rows(people)
    middle = (np.asarray(store.offsets)[rows] + np.asarray(store.offsets)[rows + 1]) // 2
    frame = slow.read_frame(root)
    reference = slow.Reference(frame[frame["subject_id"].isin(people)], tokens)
    for window in ("end", "random"):
        config = BatchesConfig(window=window, hide=0.15, time="since")
        batches = EventBatches(store, people, store.times_us[middle], tokens=tokens, config=config)
        assert slow.mismatches(batches, reference, np.arange(len(people)), epoch=1) == 0
        assert (batches.batch(np.arange(len(people))).codes.shape[1]) == 512
