"""How fast the synthetic world is made, and how much memory writing it takes.

- rendering: volumes a second of CPU time on one core, nothing written, at 32, 48 and 64 voxels a side, paired in the same run
  with ``plain`` below, which draws a simpler picture (straight vessels without branches, no signs, no margin) the plain way:
  every voxel of every vessel and spicule, double precision, filters made anew for each volume;
- ICU stays a second of CPU time: 20,000 stays of 48 h;
- writing: patients a second of wall time by image format, all workers together;
- memory: the largest sum of proportional set sizes over the process tree while a source folder of 1,000 and one of 50,000
  patients is written (read from /proc four times a second; Linux alone).

The last line on standard output is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from synthetic import concepts, ct, icu
from synthetic.draws import uniforms
from synthetic.presets import find_site
from synthetic.world import World

SITE = find_site("li2025", "internal")


def rows(count: int) -> list[dict[Any, Any]]:
    """Image parameters of the first subjects."""
    world = World.named("li2025", 0)
    t = world.sample(SITE, 0, count).t
    facts = concepts.draw(t, 0, 0)[:, concepts.IN_IMAGE]
    frame = ct.parameters(t["image"], world.loaded("image"), uniforms(0, "ct/protocol", 0, count, 3), SITE, facts)
    return frame.to_dict("records")


def plain(row: dict[Any, Any], subject: int) -> np.ndarray:
    """One patch by the formulas as one would first write them down."""
    draw, n = np.random.default_rng(subject), ct.SIZE
    grid = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2] * 3, indexing="ij"), axis=-1)
    frequency = np.stack(np.meshgrid(*[np.fft.fftfreq(n)] * 3, indexing="ij"), axis=-1)
    f, f_xy, f_z = np.linalg.norm(frequency, axis=-1), np.linalg.norm(frequency[..., :2], axis=-1), frequency[..., 2]
    f[0, 0, 0] = np.inf

    def filtered(image: np.ndarray, transfer: np.ndarray) -> np.ndarray:
        return np.fft.ifftn(np.fft.fftn(image) * transfer).real

    def field(amplitude: np.ndarray) -> np.ndarray:
        made = filtered(draw.standard_normal((n, n, n)), amplitude)
        return made / made.std()

    def unit(count: int) -> np.ndarray:
        vectors = draw.standard_normal((count, 3))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    volume = -860 - 60 * row["emphysema"] + row["density_hu"] + row["texture_hu"] * field(f**-1.5)
    volume[field(f**-1.75) > 1.6 - 1.6 * row["emphysema"]] = -960
    for centre, way in zip(draw.uniform(-12, 12, (row["vessels"], 3)), unit(row["vessels"]), strict=True):
        from_centre = grid - centre
        distance = np.linalg.norm(from_centre - (from_centre @ way)[..., None] * way, axis=-1)
        edge = expit((draw.uniform(0.7, 1.8) * row["vessel_factor"] - distance) / 0.35)
        volume += (30 + 150 * row["contrast"] - volume) * edge
    from_centre = grid - [row["offset_x_mm"], row["offset_y_mm"], row["offset_z_mm"]]
    across = 1 / np.sqrt(row["elongation"])
    radius = np.linalg.norm(from_centre * [row["elongation"], across, across], axis=-1)
    way = from_centre / np.linalg.norm(from_centre, axis=-1, keepdims=True)
    bumps = (draw.standard_normal(6) / np.sqrt(6) * (3 * (way @ unit(6).T) ** 2 - 1)).sum(-1)
    spicules = np.exp(60 * (way @ unit(14).T - 1)).sum(-1)
    shape = 1 + row["lobulation"] * bumps + 0.6 * row["spiculation"] * spicules
    inside = expit((row["diameter_mm"] / 2 * shape - radius) / 0.6)
    volume += (20 * (1 - row["ground_glass"]) - 550 * row["ground_glass"] - volume) * inside
    slices = np.sinc(f_z * row["thickness_mm"])
    noise = np.sqrt(f_xy + 0.001) * np.exp(-((f_xy / 0.28) ** 2)) * slices
    measured = filtered(volume, np.exp(-2 * (np.pi * 0.75 * f_xy) ** 2) * slices) + 25 * row["noise_factor"] * field(
        noise
    )
    return np.rint(measured.clip(-1024, 3071)).astype(np.int16)


def per_second(make: Callable[[int], Any], count: int) -> float:
    """Calls of ``make(i)`` a second of CPU time."""
    make(0)
    started = time.process_time()
    for i in range(count):
        make(i)
    return count / (time.process_time() - started)


def tree_mib(root: int) -> float:
    """Sum of the proportional set sizes of a process and all its descendants, MiB."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def write(patients: int, image_format: str, workers: int) -> dict[str, float]:
    """Write a source folder in a process of its own: seconds, patients a second, peak MiB."""
    folder = tempfile.mkdtemp(prefix="mmjepa-world-")
    command = [sys.executable, "-m", "synthetic", "generate", "--patients", str(patients), "--format", image_format]
    command += ["--workers", str(workers), "--out", f"{folder}/source", "--json"]
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_mib(process.pid))
        time.sleep(0.25)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": round(seconds, 1), "patients_per_s": round(patients / seconds, 1), "peak_mib": round(peak)}


def measure(patients: int, workers: int) -> dict[str, Any]:
    """Everything."""
    drawn = rows(200)
    ours = {
        size: per_second(lambda i, s=size: ct.render(drawn[i], 0, i, size=s), 200 * 32 // size) for size in ct.SIZES
    }
    naive = per_second(lambda i: plain(drawn[i], i), 100)
    started = time.process_time()
    icu.simulate(icu.Icu(), 0, 0, 20_000)
    stays_s = time.process_time() - started
    return {
        "benchmark": "world",
        "volumes_per_s_core": {str(size): round(rate) for size, rate in ours.items()},
        "plain_volumes_per_s_core": round(naive, 1),
        "ours_over_plain": round(ours[32] / naive, 2),
        "stays": 20_000,
        "stays_cpu_s": round(stays_s, 2),
        "stays_per_s_core": round(20_000 / stays_s),
        "dicom_1000": write(1000, "dicom", workers),
        "nifti_1000": write(1000, "nifti", workers),
        f"nifti_{patients}": write(patients, "nifti", workers),
        "workers": workers,
        "numpy": np.__version__,
    }


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patients", type=int, default=50_000, help="of the large source folder (default 50,000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that write (default 2)")
    options = parser.parse_args()
    print(json.dumps(measure(options.patients, options.workers)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
