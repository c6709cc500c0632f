"""A store is the same however it was built: in what pieces, from what row groups, in one go or killed on the way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmjepa.ehr import build, shards
from mmjepa.ehr.build import is_current
from mmjepa.ehr.sinks import ARRAYS
from mmjepa.ehr.store import EventStore
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000


def write_root(root, *, subjects=40, shards=3, group=7, reverse=False, seed=0, **columns):
    """A root of random events with late availability, admissions and images; ``group`` rows a row group."""
    rng = np.random.default_rng(seed)
    rows = []
    for subject in range(subjects):
        hours = np.sort(rng.integers(0, 9, rng.integers(0, 30)))
        rows += [(subject, None, None, f"S{subject}", None, None, None)] * int(rng.integers(0, 3))
        for hour in hours.tolist():
            late = None if rng.random() < 0.5 else hour + int(rng.integers(0, 5))
            image = f"i{len(rows)}" if rng.random() < 0.1 else None
            rows.append((subject, hour, late, f"C{rng.integers(4)}", float(rng.normal()), int(rng.integers(9)), image))
    names = ("subject_id", "time", "available_time", "code", "numeric_value", "hadm_id", "image_id")
    frame = pd.DataFrame(rows, columns=names)
    for name in ("time", "available_time"):
        frame[name] = pd.to_datetime(frame[name] * HOUR_US, unit="us").astype("datetime64[us]")
    frame = frame.astype({"numeric_value": np.float32, "hadm_id": "Int64"}).assign(**columns)
    for part in ("data", "metadata"):
        (root / part).mkdir(parents=True)
    parts = np.array_split(frame["subject_id"].unique(), shards)
    for number, people in enumerate(parts[::-1] if reverse else parts):
        table = pa.Table.from_pandas(frame[frame["subject_id"].isin(people)], preserve_index=False)
        pq.write_table(table, root / "data" / f"{number}.parquet", row_group_size=group)
    pd.DataFrame({"code": frame["code"].unique()}).to_parquet(root / "metadata" / "codes.parquet")
    return root


def contents(store):
    found = {name: np.asarray(getattr(store, name)) for name in ARRAYS if name != "split_of"}
    return found | {"images": store.image_ids, "fingerprint": store.fingerprint}


def assert_equal(one, other):
    for name, expected in contents(other).items():
        np.testing.assert_equal(contents(one)[name], expected, err_msg=name)


@pytest.mark.parametrize(("group", "batch", "piece"), [(7, 5, 11), (3, 100, 1), (10_000, 13, 40), (10_000, 10_000, 90)])
def test_neither_row_groups_nor_batches_nor_pieces_nor_shards_change_a_store(
    tmp_path, monkeypatch, group, batch, piece
):
    whole = EventStore.in_memory(write_root(tmp_path / "whole", shards=1, group=10_000))
    root = write_root(tmp_path / "cut", shards=4, group=group, reverse=True)
    monkeypatch.setattr(shards, "BATCH_ROWS", batch)
    monkeypatch.setattr(shards, "PIECE_ROWS", piece)
    assert_equal(EventStore.build(root, tmp_path / "store"), whole)
    assert_equal(EventStore.in_memory(root), whole)


def test_a_shard_without_the_others_extra_columns_joins_them(tmp_path):
    root = write_root(tmp_path / "a", shards=2)
    file = root / "data" / "1.parquet"
    bare = pq.read_table(file).drop_columns(["hadm_id", "available_time", "image_id"])
    pq.write_table(bare, file)
    store = EventStore.in_memory(root)
    late = int(np.searchsorted(store.subjects, bare["subject_id"][0].as_py()))
    rows = slice(int(store.offsets[late]), None)
    assert (store.hadm_id[rows] == -1).all()
    assert (store.available_us[rows] == store.times_us[rows]).all()
    assert (store.hadm_id[: rows.start] >= 0).any()


def test_without_late_rows_availability_is_the_time_and_takes_no_room(tmp_path):
    root = write_root(tmp_path / "a")
    for file in (root / "data").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["available_time", "hadm_id"]), file)
    store = EventStore.build(root, tmp_path / "store")
    assert store.available_us is store.times_us
    assert (tmp_path / "store" / "available_us.npy").stat().st_size < 1000


@pytest.mark.parametrize("far", [2**61, 2**63 - 1])
def test_rows_spread_over_millennia_are_ordered_too(tmp_path, far):
    """So far apart that subject and time together, or two times' distance, do not fit one number."""
    early = -far
    columns = {
        "subject_id": pa.array([1, 1, 1, 2, 2]),
        "time": pa.array([early, 0, 5, 0, 1], pa.timestamp("us")),
        "available_time": pa.array([far, early, 5, 9, 1], pa.timestamp("us")),
        "code": pa.array(["A", "B", "C", "D", "E"]),
    }
    for part in ("data", "metadata"):
        (tmp_path / part).mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "0.parquet")
    pq.write_table(pa.table({"code": columns["code"]}), tmp_path / "metadata" / "codes.parquet")
    store = EventStore.in_memory(tmp_path)
    assert [store.vocabulary[code] for code in store.codes] == ["B", "C", "A", "E", "D"]


KILLED = """
    import os, signal, sys
    from mmjepa.ehr import build, shards
    from mmjepa.ehr.store import EventStore
    root, folder, pieces = sys.argv[1], sys.argv[2], int(sys.argv[3])
    shards.PIECE_ROWS = 50
    place = build.Layout.place
    def dying(self, piece, left=[pieces]):
        left[0] -= 1
        if left[0] < 0:
            own = int(self.offsets[self.subjects.searchsorted(piece.subjects[0])])
            self.sink.write("codes", own, piece.codes[:1] + 1)  # half a piece is there
            os.kill(os.getpid(), signal.SIGKILL)
        return place(self, piece)
    build.Layout.place = dying
    EventStore.build(root, folder)
"""


def test_a_killed_build_goes_on_behind_its_last_whole_piece(tmp_path, monkeypatch):
    root, folder = write_root(tmp_path / "ehr"), tmp_path / "store"
    monkeypatch.setattr(shards, "PIECE_ROWS", 50)
    script = textwrap.dedent(KILLED)
    killed = subprocess.run([sys.executable, "-c", script, root, folder, "4"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()
    (tmp_path / ".store.building" / ".piece_0_9.json.1.partial").write_text("{")  # a kill inside a write leaves this
    total = sum(len(shards.index_shard(file).pieces()) - 1 for file in sorted((root / "data").iterdir()))
    placed, place = [], build.Layout.place
    monkeypatch.setattr(build.Layout, "place", lambda self, piece: placed.append(1) or place(self, piece))
    monkeypatch.setattr(build, "index_shard", None)  # nor is the first pass made again
    resumed = EventStore.build(root, folder)
    assert len(placed) == total - 4 > 0
    monkeypatch.undo()
    assert_equal(resumed, EventStore.in_memory(root))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]
    assert {path.name for path in folder.iterdir()} == {f"{name}.npy" for name in ARRAYS} | {"store.json"}


@pytest.mark.parametrize("changed", ["records", "boot"])
def test_what_a_killed_build_left_of_other_records_or_another_boot_is_not_used(tmp_path, monkeypatch, changed):
    root, folder = write_root(tmp_path / "ehr"), tmp_path / "store"
    monkeypatch.setattr(shards, "PIECE_ROWS", 50)
    place, calls = build.Layout.place, []

    def stopping(self, piece):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return place(self, piece)

    monkeypatch.setattr(build.Layout, "place", stopping)
    with pytest.raises(KeyboardInterrupt):
        EventStore.build(root, folder)
    if changed == "records":
        shutil.rmtree(root)
        write_root(root, seed=1)
    else:
        (tmp_path / "boot_id").write_text("another")
        monkeypatch.setattr(build, "_BOOT", tmp_path / "boot_id")
    before = len(calls)
    store = EventStore.build(root, folder)
    assert len(calls) - before == sum(len(shards.index_shard(file).pieces()) - 1 for file in (root / "data").iterdir())
    assert_equal(store, EventStore.in_memory(root))


def test_a_refused_build_leaves_nothing_and_keeps_the_older_store(tmp_path):
    root, folder = write_root(tmp_path / "ehr"), tmp_path / "store"
    EventStore.build(root, folder)
    pd.DataFrame({"code": ["C0"]}).to_parquet(root / "metadata" / "codes.parquet")
    with pytest.raises(Refusal, match="MEDS_CODE_UNLISTED"):
        EventStore.build(root, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]
    assert not is_current(folder, root)


def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = write_root(tmp_path / "ehr")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refusal, match="DISK_FULL"):
        EventStore.build(root, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["ehr"]


def test_a_shard_that_vanishes_is_an_error(tmp_path, monkeypatch):
    root, read = write_root(tmp_path / "ehr"), build.read_pieces
    monkeypatch.setattr(build, "read_pieces", lambda *given: given[1].path.unlink() or read(*given))
    with pytest.raises(Refusal, match="MEDS_UNREADABLE"):
        EventStore.build(root, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["ehr"]


def test_where_no_file_can_be_locked_a_store_is_built_all_the_same(tmp_path, monkeypatch):
    def unlockable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    root = write_root(tmp_path / "ehr")
    monkeypatch.setattr(build.fcntl, "flock", unlockable)
    assert_equal(EventStore.build(root, tmp_path / "store"), EventStore.in_memory(root))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]


def test_a_build_that_begins_while_another_takes_the_old_store_away_waits_for_it(tmp_path, monkeypatch):
    root, folder = write_root(tmp_path / "ehr"), tmp_path / "store"
    folder.mkdir()
    (folder / "store.json").write_text("{}")
    late, swap = [], build.shutil.rmtree
    second = threading.Thread(target=lambda: late.append(EventStore.build(root, folder)))

    def slow(path, **options):
        if second.ident is None and str(path) in (str(folder), str(tmp_path / ".store.old")) and Path(path).exists():
            second.start()
            second.join(0.5)
            assert not late
        swap(path, **options)

    monkeypatch.setattr(build.shutil, "rmtree", slow)
    first = EventStore.build(root, folder)
    second.join()
    assert_equal(first, EventStore.in_memory(root))
    assert_equal(late[0], first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]


def test_two_builds_without_locks_leave_a_whole_store(tmp_path, monkeypatch):
    root, folder = write_root(tmp_path / "ehr"), tmp_path / "store"
    replace, done = os.replace, []

    def overtaken(one, other):
        if other == folder and not done:
            done.append(EventStore.in_memory(root))
            (folder / "taken").mkdir(parents=True)
        replace(one, other)

    monkeypatch.setattr(build.os, "replace", overtaken)
    assert_equal(EventStore.build(root, folder), done[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]


def test_only_a_store_or_an_empty_folder_is_replaced(tmp_path):
    root, folder = write_root(tmp_path / "ehr"), tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        EventStore.build(root, folder)
    with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
        EventStore.build(root, folder / "thesis.txt")
    for place in (root, root / "data" / "store", tmp_path):
        with pytest.raises(Refusal, match="OUT_IN_SOURCE"):
            EventStore.build(root, place)
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    assert_equal(EventStore.build(root, folder), EventStore.in_memory(root))


def test_a_link_to_a_store_elsewhere_stays_a_link(tmp_path):
    root, place = write_root(tmp_path / "ehr"), tmp_path / "scratch"
    place.mkdir()
    (tmp_path / "store").symlink_to(place)
    assert_equal(EventStore.build(root, tmp_path / "store"), EventStore.in_memory(root))
    assert (tmp_path / "store").is_symlink()
    assert (place / "store.json").is_file()


def test_a_store_that_is_there_is_not_built_again(tmp_path, monkeypatch):
    root = write_root(tmp_path / "ehr")
    first = EventStore.build(root, tmp_path / "store")
    monkeypatch.setattr(build, "index_shard", None)
    assert_equal(EventStore.build(root, tmp_path / "store"), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]


def test_several_processes_that_build_at_once_make_one_store(tmp_path):
    root = write_root(tmp_path / "ehr")
    script = "import sys; from mmjepa.ehr.store import EventStore; print(EventStore.build(*sys.argv[1:]).fingerprint)"
    at_once = [
        subprocess.Popen([sys.executable, "-c", script, root, tmp_path / "store"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in at_once}
    assert printed == {EventStore.in_memory(root).fingerprint}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ehr", "store"]
