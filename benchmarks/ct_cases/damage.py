"""Small series and random damage to their bytes."""

import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from mmjepa.keyed import generator

from .base import CASES, real_series, stored, synthetic_series

DEPTH, HEADER_BYTES = 5, 1200
SERIES = (
    "clean", "implicit_little_endian", "deflated", "run_length", "jpeg2000_without_class", "padding_signed",
    "intercept_per_slice", "two_slices_missing", "steps_that_differ_a_little", "padding_among_values", "padding_like_metal_declared",
    "rubbish_in_unused_bits", "fractional_slope", "interleaved_reconstructions", "enhanced_whole", "nifti_clean", "nifti_gzip", "nifti_scaled",
)  # fmt: skip
_DEEP = {"two_slices_missing", "interleaved_reconstructions"}
Files = dict[str, bytes]


def bases(data: Path | None) -> list[tuple[str, Files]]:
    """The undamaged series by name, as file names and bytes."""
    found = []
    for name in SERIES:
        depth = DEPTH + 3 if name in _DEEP else DEPTH
        found.append((name, _built(name, synthetic_series(depth=DEPTH + 3)[:depth])))
    real = real_series(data)
    if real:
        for part in real[:DEPTH]:
            stored(part, part.pixel_array[200:224, 100:140])
        found.append(("real", _built("clean", real[:DEPTH])))
    return found


def _built(name: str, slices: list[Any]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        CASES[name](Path(folder), slices)
        paths = sorted(Path(folder).iterdir())
        slices = [path for path in paths if path.name.startswith("a_")]
        order = iter(
            generator(len(slices), "fuzz/order").permutation(len(slices))
        )  # no name tells the place of a slice
        return {slices[next(order)].name if path in slices else path.name: path.read_bytes() for path in paths}


def damaged(files: Files, rng: np.random.Generator) -> tuple[str, Files]:
    """What was done, and the files after it: one kind of damage to one file, rarely to several."""
    images = [name for name in files if not name.endswith(".csv")]
    kind = str(rng.choice(["flip", "flip header", "blank", "cut out", "repeat", "cut off", "delete tag"]))
    hit = rng.choice(images, size=min(len(images), int(rng.choice([1, 1, 1, DEPTH]))), replace=False)
    where = int(rng.integers(2**31))  # the same place in each file
    changed = {str(name): _damage(files[name], kind, generator(where, "fuzz/damage")) for name in hit}
    return kind, {**files, **changed}


def _damage(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    if kind == "delete tag":
        return _without_a_tag(content, rng)
    blob = bytearray(content)
    reach = min(HEADER_BYTES, len(blob)) if kind == "flip header" else len(blob)
    start, length = int(rng.integers(reach)), int(2 ** rng.uniform(0, 8))
    if kind.startswith("flip"):
        for place in rng.integers(reach, size=int(rng.choice([1, 2, 8]))):
            blob[place] ^= int(rng.integers(1, 256))
    elif kind == "blank":
        blob[start : start + length] = bytes(len(blob[start : start + length]))
    elif kind == "cut out":
        del blob[start : start + length]
    elif kind == "repeat":
        blob[start:start] = blob[start : start + length]
    else:
        del blob[start:]
    return bytes(blob)


def _without_a_tag(content: bytes, rng: np.random.Generator) -> bytes:
    """Delete an element, also inside the items of a sequence; NIfTI has no tags and loses the last byte."""
    if content[128:132] != b"DICM":
        return content[:-1]
    data = pydicom.dcmread(BytesIO(content))
    places = list(_elements(data))
    owner, tag = places[int(rng.integers(len(places)))]
    del owner[tag]
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, data)
    return buffer.getvalue()


def _elements(data: Dataset) -> Iterator[tuple[Dataset, Any]]:
    for element in data:
        yield data, element.tag
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)
