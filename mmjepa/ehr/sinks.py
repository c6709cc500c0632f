"""Where the arrays of an event store are written: to memory, or to the files of a folder."""

import os
from pathlib import Path
from typing import IO, Protocol

import numpy as np

ARRAYS: dict[str, type] = {
    "subjects": np.int64,
    "offsets": np.int64,
    "times_us": np.int64,
    "available_us": np.int64,
    "codes": np.int32,
    "values": np.float32,
    "static_offsets": np.int64,
    "static_codes": np.int32,
    "static_values": np.float32,
    "hadm_id": np.int64,
    "image_rows": np.int64,
    "split_of": np.int32,
}


class Sink(Protocol):
    """Where the arrays go. An array is created once, then written in ranges."""

    def create(self, name: str, rows: int) -> None: ...

    def write(self, name: str, at: int, values: np.ndarray) -> None: ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...


class MemorySink:
    """Arrays in memory."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def create(self, name: str, rows: int) -> None:
        self.arrays[name] = np.empty(rows, ARRAYS[name])

    def write(self, name: str, at: int, values: np.ndarray) -> None:
        self.arrays[name][at : at + len(values)] = values

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.arrays[name][start:stop]


class FolderSink:
    """One ``.npy`` a name, written in place by plain writes: a map's dirty pages would count as this process's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, tuple[IO[bytes], int]] = {}

    def create(self, name: str, rows: int) -> None:
        """Make the file, or open the one that an earlier build left."""
        path, kind = self.folder / f"{name}.npy", np.dtype(ARRAYS[name])
        handle = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by close)
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(handle, header)
        start = handle.tell()
        handle.truncate(start + rows * kind.itemsize)
        handle.flush()
        self._files[name] = handle, start

    def write(self, name: str, at: int, values: np.ndarray) -> None:
        handle, start = self._files[name]
        values = np.ascontiguousarray(values, ARRAYS[name])
        left, place = values.view(np.uint8).data, start + at * values.itemsize
        while left:
            done = os.pwrite(handle.fileno(), left, place)
            left, place = left[done:], place + done

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        handle, first = self._files[name]
        kind = np.dtype(ARRAYS[name])
        return np.frombuffer(
            os.pread(handle.fileno(), (stop - start) * kind.itemsize, first + start * kind.itemsize), kind
        )

    def close(self) -> None:
        """Flush everything to the disk."""
        for handle, _ in self._files.values():
            os.fsync(handle.fileno())
            handle.close()
