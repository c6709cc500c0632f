"""Random damage to small CT series, by the thousand, against the ingest: it never crashes and is never fooled in silence.

A case is a folder with one small series (DICOM in several syntaxes, Enhanced CT, NIfTI, and a crop of a real series where the
folder of optional data has it); some bytes of one or more files are flipped, blanked, cut out, repeated or cut off, or a tag is
deleted. What is done to case n is fixed by (seed, n). Every case is ingested by a pool of child processes, each under a limit of
time and memory.

- **crash**: the child dies or does not answer in time, an exception that is no Refusal leaves the ingest, a file is opened for
  writing (or made, renamed, removed) outside the out folder, the source folder is changed, or the manifest does not account for
  every file.
- **silent**: a volume is accepted, and decoding the same damaged bytes slice by slice with pydicom (nibabel for NIfTI) gives no
  volume of these voxels and this affine in which every pixel lies where its own slice's header puts it. Left out of that decode
  are files that by their own header are no CT slices, and files that pydicom cannot decode: that the manifest counts them, or
  flags what is left of their series, is checked by the count of files alone.

Each such case is one row on standard output; then how many cases came to that comparison, and one JSON object. Exit code 1 when
there is any.
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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pydicom
from ct_cases.damage import Files, bases, damaged
from ct_cases.decode import Decoded, decoded, in_place, same, stored
from ct_malformed import LIMIT_BYTES, SALT

from mmjepa.ct.ingest import ingest_images
from mmjepa.identity import Crosswalk
from mmjepa.keyed import generator
from mmjepa.refusal import Refusal

LIMIT_S = 30
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


@dataclass(frozen=True)
class Finding:
    """A case that went wrong. kind: crash or silent."""

    kind: str
    what: str


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


def examine(source: Path, out: Path, watch: Watch) -> tuple[Finding | None, bool]:
    """Ingest one damaged folder and judge what came of it; whether that came to a comparison of voxels."""
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
        return Finding("crash", f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"), False
    finally:
        watch.allowed = None
    if watch.strays or _bytes_below(source) != before:
        return Finding("crash", f"wrote outside the out folder: {watch.strays or 'source changed'}"), False
    ours = stored(out)
    if manifest and not _accounts(manifest, ours):
        return Finding("crash", "the manifest does not account for every file and volume"), False
    theirs = decoded(source) if ours else []
    for one in ours:
        if not any(same(one, other) and (not planes or in_place(one, planes)) for other, planes in theirs):
            return Finding("silent", "accepted voxels or geometry differ from those of the damaged bytes"), True
    return None, bool(ours)


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
    """A child: take case numbers, answer with (base, damage, finding, whether voxels were compared)."""
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
        pipe.send((base, kind, *examine(source, out, watch)))
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

    def answer(self, ready: bool) -> tuple[str, str, Finding | None, bool] | None:
        """What the child says of its case; a crash when it died or is late, None when it is still at it."""
        if ready:
            try:
                return self.pipe.recv()
            except EOFError:
                return "?", "?", Finding("crash", "the process died"), False
        late = time.monotonic() > self.deadline
        return ("?", "?", Finding("crash", "no end in time"), False) if late else None

    def stop(self) -> None:
        self.child.kill()
        self.child.join()
        self.pipe.close()


def fuzz(cases: int, seed: int, jobs: int, data: Path | None) -> Counter[str]:
    """Run the cases, print a row for each that went wrong; how many crashed, were silent, were compared voxel by voxel."""
    series, numbers, findings = bases(data), iter(range(cases)), Counter(crash=0, silent=0, compared=0)
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
                base, kind, finding, compared = answer
                findings["compared"] += compared
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
    print(f"voxels compared in {findings['compared']} cases")
    print(json.dumps({"cases": options.cases, "crashes": findings["crash"], "silent": findings["silent"]}))
    return 1 if findings["crash"] or findings["silent"] else 0


if __name__ == "__main__":
    sys.exit(main())
