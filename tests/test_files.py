import contextlib
import errno
import hashlib
from pathlib import Path

import pytest

from mmjepa.files import atomic_path, fresh_folder, read_json, sha256, write_json
from mmjepa.refusal import Refusal


def fail_halfway(target: Path) -> None:
    with contextlib.suppress(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "table.txt"
    fail_halfway(target)
    assert list(target.parent.iterdir()) == []
    with atomic_path(target, durable=True) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["table.txt"]


def test_a_failed_write_leaves_the_older_file_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"n": 1})
    fail_halfway(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == {"n": 1}


def test_a_folder_appears_whole(tmp_path):
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("w")
    assert (tmp_path / "model" / "weights").read_text() == "w"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_refusal(tmp_path, number):
    with pytest.raises(Refusal, match="DISK_FULL"), atomic_path(tmp_path / "a"):
        raise OSError(number, "full")


def test_another_system_error_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


def test_json_that_is_missing_or_torn_is_refused_by_name(tmp_path):
    with pytest.raises(Refusal, match="FILE_MISSING"):
        read_json(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(Refusal, match="FILE_BROKEN"):
        read_json(tmp_path / "torn.json")


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "data").write_bytes(data)
    sizes: list[int] = []
    assert sha256(tmp_path / "data", update=sizes.append) == hashlib.sha256(data).hexdigest()
    assert sum(sizes) == len(data)


def test_an_existing_output_is_never_written_over(tmp_path):
    assert fresh_folder(tmp_path / "new", "run") == tmp_path / "new"
    assert fresh_folder(tmp_path, "run") == tmp_path
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(Refusal, match="OUTPUT_EXISTS"):
            fresh_folder(taken, "run")
