"""Random damage to small CT series, by the thousand, against the ingest: it never crashes and is never fooled in silence.

A case is a folder with one small series (DICOM in several syntaxes, Enhanced CT, NIfTI, and a crop of a real series where the
folder of optional data has it); some bytes of one or more files are flipped, blanked, cut out, repeated or cut off, or a tag is
deleted. What is done to case n is fixed by (seed, n). Every case is ingested by a pool of child processes, each under a limit of
time and memory.

- **crash**: the child dies or does not answer in time, an exception that is no Refusal leaves the ingest, a file is opened for
  writing (or made, renamed, removed) outside the out folder, the source folder is changed, or the manifest does not account for
  every file.
- **silent**: a volume is accepted, and decoding the same damaged bytes slice by slice with pydicom (nibabel for NIfTI), each
  slice at the place that its own header states, gives no volume of these voxels and this affine. Left out of that decode are
  only files that by their own header are no CT slices; the manifest must have counted them.

Each such case is one row on standard output; then one JSON object. Exit code 1 when there is any.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import ct_cases  # pyrefly: ignore[missing-import]
import nibabel as nib
import numpy as np
import pydicom
from ct_malformed import FLOOR_HU, LIMIT_BYTES, SALT, Decoded, canonical, same, stored  # pyrefly: ignore[missing-import]
from pydicom.dataset import Dataset

from mmjepa.ct.ingest import ingest_images
from mmjepa.identity import Crosswalk
from mmjepa.keyed import generator
from mmjepa.refusal import Refusal

DEPTH, HEADER_BYTES, LIMIT_S = 5, 1200, 30
SERIES = (
    "clean", "implicit_little_endian", "deflated", "run_length", "jpeg2000_without_class", "padding_signed",
    "intercept_per_slice", "enhanced_whole", "nifti_clean", "nifti_gzip", "nifti_scaled",
)  # fmt: skip
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CT_CLASSES = {f"1.2.840.10008.5.1.4.1.1.2{kind}" for kind in ("", ".1", ".2")}
Files = dict[str, bytes]


@dataclass(frozen=True)
class Finding:
    """A case that went wrong. kind: crash or silent."""

    kind: str
    what: str


def bases(data: Path | None) -> list[tuple[str, Files]]:
    """The undamaged series by name, as file names and bytes."""
    found = []
    for name in SERIES:
        found.append((name, _built(name, ct_cases.synthetic_series(depth=DEPTH + 3)[:DEPTH])))
    real = ct_cases.real_series(data)
    if real:
        for part in real[:DEPTH]:
            ct_cases.stored(part, part.pixel_array[200:224, 100:140])
        found.append(("real", _built("clean", real[:DEPTH])))
    return found


def _built(name: str, slices: list[Any]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        ct_cases.CASES[name](Path(folder), slices)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


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


@dataclass(frozen=True)
class Plane:
    """One slice as its own header and bytes tell it."""

    series: str
    acquisition: str
    cosines: np.ndarray  # along a row, along a column
    position_mm: np.ndarray
    spacing_mm: tuple[float, float]
    hu: np.ndarray  # rows, columns


def planes(path: Path) -> list[Plane]:
    """Every slice of a DICOM file that pydicom decodes; none where it fails, or where the contract wants the file skipped."""
    try:
        data = pydicom.dcmread(path, force=True)
        if not getattr(data.file_meta, "TransferSyntaxUID", None):
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        if not _is_ct(data):
            return []
        raw = data.pixel_array
        frames = raw if raw.ndim == 3 else raw[None]
        per_frame = data.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * len(frames)
        shared = (data.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        return [_plane(data, shared, own, frame) for own, frame in zip(per_frame, frames, strict=True)]
    except Exception:  # damaged: nothing may be accepted from it
        return []


def _is_ct(data: pydicom.FileDataset) -> bool:
    """Rules 2 and 3 of the contract; what they leave out, the manifest must count."""
    sop_class = _text(data, "SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    scout = "LOCALIZER" in list(data.get("ImageType") or [])[2:3]
    return sop_class in CT_CLASSES and _text(data, "Modality") in ("CT", "") and not scout


def _plane(data: Dataset, shared: Dataset, own: Dataset, raw: np.ndarray) -> Plane:
    def get(name: str, group: str) -> Any:
        for place in (own, shared):
            if group in place:
                return place[group].value[0].get(name)
        return data.get(name)

    slope, intercept = (get(f"Rescale{part}", "PixelValueTransformationSequence") for part in ("Slope", "Intercept"))
    hu = raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if data.get("PixelPaddingValue") is not None:
        ends = [data.PixelPaddingValue, data.get("PixelPaddingRangeLimit") or data.PixelPaddingValue]
        wrap = 1 << data.BitsAllocated
        low, high = sorted(int(end) % wrap for end in ends)
        stored_values = raw.astype(np.int64) % wrap
        hu[(stored_values >= low) & (stored_values <= high)] = FLOOR_HU
    rows, columns = get("PixelSpacing", "PixelMeasuresSequence")
    return Plane(
        series=str(data.get("SeriesInstanceUID")),
        acquisition=f"{_text(data, 'AcquisitionNumber')} {_text(data, 'TemporalPositionIdentifier')}",
        cosines=np.array(get("ImageOrientationPatient", "PlaneOrientationSequence"), dtype=float).reshape(2, 3),
        position_mm=np.array(get("ImagePositionPatient", "PlanePositionSequence"), dtype=float),
        spacing_mm=(float(rows), float(columns)),
        hu=hu,
    )


def _text(data: Dataset, name: str) -> str:
    """A tag that moves no voxel; one that cannot be parsed counts as absent."""
    try:
        return str(data.get(name) or "")
    except Exception:
        return ""


def decoded(source: Path) -> list[Decoded]:
    """Every volume that the bytes in ``source`` could rightly give."""
    found = []
    stacks: dict[tuple, list[Plane]] = defaultdict(list)
    for path in sorted(source.iterdir()):
        for plane in planes(path):
            key = (plane.series, tuple(plane.cosines.round(4).ravel() + 0.0), plane.spacing_mm, plane.hu.shape)
            stacks[key].append(plane)
            stacks[*key, plane.acquisition].append(plane)
        try:
            found.append(canonical(nib.Nifti1Image.from_bytes(_unzipped(path))))
        except Exception:  # DICOM, or damaged
            continue
    return [_stacked(stack) for stack in stacks.values() if len(stack) > 1] + found


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    return ct_cases.gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _stacked(stack: list[Plane]) -> Decoded:
    normal = np.cross(*stack[0].cosines)
    stack = sorted(stack, key=lambda plane: float(plane.position_mm @ normal))
    affine, first = np.eye(4), stack[0]
    step = np.median(np.diff([plane.position_mm @ normal for plane in stack]))
    affine[:3, 0], affine[:3, 1] = first.cosines[0] * first.spacing_mm[1], first.cosines[1] * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = normal * step, first.position_mm
    voxels = np.stack([plane.hu.T for plane in stack], axis=2).astype(np.float64)
    try:
        return canonical(nib.Nifti1Image(voxels, np.diag([-1, -1, 1, 1]) @ affine))
    except Exception:  # an affine that spans no volume
        return voxels, affine


class Watch:
    """Notes every writing access of this process outside one folder. An audit hook cannot be taken back."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.strays: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if self.allowed is None or not (event == "open" or event in WRITES):
            return
        writing = event in WRITES or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
            if writing and isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.realpath(os.fsdecode(path))
                if not (place + os.sep).startswith(self.allowed + os.sep) and place != os.devnull:
                    self.strays.append(event)


def examine(source: Path, out: Path, watch: Watch) -> Finding | None:
    """Ingest one damaged folder and judge what came of it."""
    before = _bytes_below(source)
    watch.strays.clear()
    watch.allowed = os.path.realpath(out)
    manifest: dict[str, Any] = {}
    try:
        manifest = ingest_images(source, out, crosswalk=Crosswalk.none(SALT))
    except Refusal:
        pass
    except BaseException as error:  # whatever it is, it is a crash
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Finding("crash", f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}")
    finally:
        watch.allowed = None
    if watch.strays or _bytes_below(source) != before:
        return Finding("crash", f"wrote outside the out folder: {watch.strays or 'source changed'}")
    ours = stored(out)
    if manifest and not _accounts(manifest, ours):
        return Finding("crash", "the manifest does not account for every file and volume")
    theirs = decoded(source) if ours else []
    if not all(any(same(one, other) for other in theirs) for one in ours):
        return Finding("silent", "accepted voxels or geometry differ from those of the damaged bytes")
    return None


def _bytes_below(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _accounts(manifest: dict[str, Any], ours: Sequence[Decoded]) -> bool:
    """As many volumes on the disk as accepted, and no file that is neither in a volume, nor skipped, nor in a refusal."""
    if len(ours) != manifest["accepted"]:
        return False
    dicom = [v for v in manifest["volumes"] if v["status"] == "accepted" and v["source_kind"] == "dicom"]
    if manifest["refused"] or not dicom or manifest["files"] == 1:
        return True
    return sum(volume["shape"][2] for volume in dicom) + sum(manifest["skipped"].values()) == manifest["files"]


def _work(folder: Path, seed: int, series: list[tuple[str, Files]], pipe: Connection) -> None:
    """A child: take case numbers, answer with (base, damage, finding)."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    watch = Watch()
    while (number := pipe.recv()) is not None:
        rng = generator(seed, "fuzz", number)
        base, files = series[int(rng.integers(len(series)))]
        kind, changed = damaged(files, rng)
        source, out = folder / str(number) / "source", folder / str(number) / "out"
        source.mkdir(parents=True)
        for name, content in changed.items():
            (source / name).write_bytes(content)
        pipe.send((base, kind, examine(source, out, watch)))
        shutil.rmtree(folder / str(number))


class Lane:
    """One child and the case it is at."""

    def __init__(self, *arguments: Any) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.child = context.Process(target=_work, args=(*arguments, theirs), daemon=True)
        self.child.start()
        theirs.close()
        self.number, self.deadline = -1, 0.0

    def give(self, number: int) -> None:
        self.number, self.deadline = number, time.monotonic() + LIMIT_S
        self.pipe.send(number)

    def answer(self, ready: bool) -> tuple[str, str, Finding | None] | None:
        """What the child says of its case; a crash when it died or is late, None when it is still at it."""
        if ready:
            try:
                return self.pipe.recv()
            except EOFError:
                return "?", "?", Finding("crash", "the process died")
        return ("?", "?", Finding("crash", "no end in time")) if time.monotonic() > self.deadline else None

    def stop(self) -> None:
        self.child.kill()
        self.child.join()
        self.pipe.close()


def fuzz(cases: int, seed: int, jobs: int, data: Path | None) -> Counter[str]:
    """Run the cases, print a row for each that went wrong; how many crashed and how many were silent."""
    series, numbers, findings = bases(data), iter(range(cases)), Counter(crash=0, silent=0)
    with tempfile.TemporaryDirectory(prefix="ct_fuzz_") as folder:

        def fresh() -> Lane | None:
            number = next(numbers, None)
            if number is None:
                return None
            lane = Lane(Path(folder), seed, series)
            lane.give(number)
            return lane

        lanes = [lane for _ in range(jobs) if (lane := fresh())]
        while lanes:
            ready = wait([lane.pipe for lane in lanes], timeout=1)
            for lane in list(lanes):
                answer = lane.answer(lane.pipe in ready)
                if answer is None:
                    continue
                base, kind, finding = answer
                if finding:
                    findings[finding.kind] += 1
                    print(f"{finding.kind} case {lane.number} ({base}, {kind}): {finding.what}", flush=True)
                if base != "?" and (number := next(numbers, None)) is not None:
                    lane.give(number)
                    continue
                lane.stop()
                lanes.remove(lane)
                lanes += [another for another in [fresh()] if another]
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and print the counts; 0 when there is no finding."""
    parser = argparse.ArgumentParser(description="Damaged CT files against the ingest.")
    default = Path(os.environ.get("MMJEPA_DATA", Path(__file__).parents[1] / "shared" / "data"))
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="child processes")
    parser.add_argument("--data", type=Path, default=default, help="folder of optional real data")
    options = parser.parse_args(arguments)
    findings = fuzz(options.cases, options.seed, options.jobs, options.data)
    print(json.dumps({"cases": options.cases, "crashes": findings["crash"], "silent": findings["silent"]}))
    return 1 if findings.total() else 0


if __name__ == "__main__":
    sys.exit(main())
