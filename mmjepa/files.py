"""Files that are whole or absent: written under a temporary name, then renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmjepa.refusal import Refusal


@contextmanager
def atomic_path(path: Path | str, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` to write a file or a folder to; rename it there on success, remove it on failure.

    durable: flush the file to the disk before the rename. Raises Refusal ``DISK_FULL`` when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        if durable and temporary.is_file():
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if _says_disk_full(error):
            raise Refusal(
                "DISK_FULL",
                f"no space left while writing {path}",
                "Free some space, then run the same command again (pretraining: with resume=true)",
            ) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _says_disk_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {code})" in str(error) for code in full)  # safetensors raises an error of its own


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read JSON; a missing or broken file is a Refusal that names it."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise Refusal("FILE_MISSING", f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal("FILE_BROKEN", f"{path} is not valid JSON ({error})") from None


def sha256(path: Path | str, *, update: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
            if update:
                update(len(piece))
    return digest.hexdigest()


def fresh_folder(path: Path | str, what: str) -> Path:
    """The path of an output folder that must not hold anything yet; an existing output is never overwritten."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refusal(
            "OUTPUT_EXISTS",
            f"{path} already exists",
            f"Resume it where the command allows that, or name another {what}",
        )
    return path
