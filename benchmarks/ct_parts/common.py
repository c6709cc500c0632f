"""What every part of the CT benchmark uses."""

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mmjepa.ct import ingest
from mmjepa.identity import Crosswalk

CROSSWALK = Crosswalk.none("a salt for benchmarks")


def say(name: str, ratio: float, target: float | None = None, *, at_most: bool = False, **figures: float) -> None:
    """One JSON line. Without a target nothing is met or missed."""
    bound = {}
    if target is not None:
        met = ratio <= target if at_most else ratio >= target
        bound = {"at_most" if at_most else "at_least": target, "met": bool(met)}
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    print(json.dumps({"name": name, "ratio": float(f"{ratio:.3g}"), **bound, **rounded}), flush=True)


def cpu_s(repeats: int, *works: Callable[[], Any]) -> list[float]:
    """Median CPU seconds of each work, which take turns; each runs once before."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, spent in zip(works, times, strict=True):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
    return [statistics.median(spent) for spent in times]


def make_store(folder: Path, count: int, shape: tuple[int, int, int], form: str = "npy") -> list[Path]:
    """NIfTI volumes of noise in 88 values, ingested to ``folder/cohort``; their paths."""
    (folder / "source").mkdir(parents=True)
    paths, lines = [], ["file,patient_id,time"]
    for n in range(count):
        rng = np.random.default_rng(n)
        hu = (rng.integers(-1000, 400, shape) // 16 * 16).astype(np.int16)
        paths.append(folder / "source" / f"{n}.nii")
        nib.save(nib.Nifti1Image(hu, np.diag([1.5, 1.5, 1.5, 1])), paths[-1])
        lines.append(f"{n}.nii,P{n},")
    (folder / "source" / "images.csv").write_text("\n".join(lines) + "\n")
    ingest.ingest_images(folder / "source", folder / "cohort", crosswalk=CROSSWALK, form=form)
    return paths


def anonymous_mb() -> float:
    """Memory of this process that no file backs, where the system tells it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), float("nan"))


def peak_anonymous_mb(work: Callable[[], Any]) -> float:
    """The most of it while a work runs, looked at every millisecond by a thread."""
    done, seen = threading.Event(), [anonymous_mb()]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)
