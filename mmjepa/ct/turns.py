"""One ingest at a time writes to a cohort's ``ct`` folder, whoever is killed: locks that the system gives back when a process ends."""

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmjepa.refusal import Refusal


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (made where it is not there), without what killed runs left half written in it; SIGTERM ends it as Ctrl-C does.

    Raises Refusal INGEST_RUNNING while another process holds it.
    """
    volumes = folder / "volumes"
    volumes.mkdir(parents=True, exist_ok=True)
    with _terminable(), _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        with _locked(volumes, fcntl.LOCK_EX):  # a worker of a killed run may be at its last volume
            _sweep(folder)
            _sweep(volumes)
        yield


@contextmanager
def writing(volumes: Path, parent: int) -> Iterator[None]:
    """Write a volume for the run of process ``parent``; a worker whose parent is gone ends instead."""
    with _locked(volumes, fcntl.LOCK_SH):
        if parent not in (os.getpid(), os.getppid()):
            os._exit(1)
        yield


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            raise Refusal(
                "INGEST_RUNNING", f"another ingest is writing to {folder}", "Wait for it, or name another out"
            ) from None
        yield
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes that are gone."""
    for path in folder.glob(".*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _lives(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that workers are ended and temporary files removed."""
    usual = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if usual:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
