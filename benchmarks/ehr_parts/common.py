"""What the parts share: options, lines of output, a synthetic MEDS root, processes whose memory is watched."""

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START_US = 1_500_000_000_000_000
HOUR_US = 3_600_000_000
CODES = 2_000
LABELS = "outcome"


@dataclass(frozen=True)
class Options:
    """scratch: a folder for what is generated, removed at the end. peer_env: where environments of peers are kept.
    mimic: the MIMIC-IV demo as a MEDS root, if there is one. small: tiny sizes, which say that the path works and nothing
    of its speed."""

    scratch: Path
    peer_env: Path
    mimic: Path | None = None
    small: bool = False


def line(part: str, ratio: float | None = None, at_least: float | None = None, **figures: Any) -> dict[str, Any]:
    """One line of output; with a goal it says whether it is met."""
    goal = {} if at_least is None else {"at_least": at_least, "met": ratio is not None and ratio >= at_least}
    shown = {"part": part} | ({} if ratio is None else {"ratio": ratio}) | goal | figures
    return {name: _short(value) for name, value in shown.items()}


def _short(value: Any) -> Any:
    """Four digits of a number or of the numbers of a list."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def in_turns(repeats: int, *works: Callable[[], float]) -> list[float]:
    """Median of what each work returns (its CPU seconds); they take turns, and each runs once before."""
    spent = [[work() for work in works] for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*spent, strict=True)]


def cpu_s(work: Callable[[], Any]) -> float:
    """CPU seconds of this process over a work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def environment() -> dict[str, str]:
    """One thread, and the parts importable."""
    folders = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}


def in_child(module: str, function: str, *arguments: str | Path) -> dict[str, Any]:
    """Run ``ehr_parts.<module>.<function>`` (text arguments in, a JSON object out) in a process of its own.

    Adds peak_anonymous_mib (sampled every 20 ms: without pages of mapped files) and peak_rss_mib (with them, exact).
    """
    command = [
        sys.executable,
        "-c",
        f"from ehr_parts.common import child; child({module!r}, {function!r})",
        *map(str, arguments),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        anonymous = 0
        while process.poll() is None:
            anonymous = max(anonymous, _anonymous_kib(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{module}.{function} ended with {process.returncode}")
    return {**json.loads(printed), "peak_anonymous_mib": anonymous / 1024}


def child(module: str, function: str) -> None:
    """The other side of ``in_child``."""
    found = getattr(importlib.import_module(f"ehr_parts.{module}"), function)(*sys.argv[1:])
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({**found, "peak_rss_mib": int(status["VmHWM"].split()[0]) / 1024}))


def _anonymous_kib(pid: int) -> int:
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("Anonymous:")), 0)


def write_world(
    root: Path, lengths: np.ndarray, *, shards: int = 8, seed: int = 0, extras: bool = False, row_group: int = 1 << 20
) -> Path:
    """A MEDS root whose subject i has two static and ``lengths[i]`` timed rows: 2,000 codes, half of the rows with a value.

    extras: also a hadm_id and, for three rows in ten, an available_time two hours late. Every subject has a label in
    ``labels/outcome`` at the time of its last event; splits 80/10/10.
    """
    shutil.rmtree(root, ignore_errors=True)
    for part in ("data", "metadata", f"labels/{LABELS}"):
        (root / part).mkdir(parents=True)
    names = np.array([f"LAB//{50_000 + i}//mg/dL" for i in range(CODES)] + ["SEX//F", "SEX//M", "BLOOD//0", "BLOOD//A"])
    pq.write_table(pa.table({"code": pa.array(names)}), root / "metadata" / "codes.parquet")
    subjects = 1_000_003 + 7 * np.arange(len(lengths))
    last = np.empty(len(lengths), np.int64)
    for number, some in enumerate(np.array_split(np.arange(len(lengths)), shards)):
        rng = np.random.default_rng([seed, number])
        table, last[some] = _shard(rng, subjects[some], lengths[some], names, extras)
        pq.write_table(table, root / "data" / f"{number}.parquet", row_group_size=row_group)
    split = np.array(["train"] * 8 + ["tuning", "held_out"])[np.arange(len(lengths)) % 10]
    pq.write_table(pa.table({"subject_id": subjects, "split": split}), root / "metadata" / "subject_splits.parquet")
    label = {"boolean_value": np.random.default_rng(seed).random(len(lengths)) < 0.2}
    times = {"subject_id": subjects, "prediction_time": pa.array(last, pa.timestamp("us"))}
    pq.write_table(pa.table(times | label), root / "labels" / LABELS / "0.parquet")
    return root


def _shard(
    rng: np.random.Generator, subjects: np.ndarray, lengths: np.ndarray, names: np.ndarray, extras: bool
) -> tuple[pa.Table, np.ndarray]:
    rows = lengths + 2
    ends = np.cumsum(rows)
    count, owner = int(ends[-1]), np.repeat(np.arange(len(subjects)), rows)
    number = np.arange(count) - (ends - rows)[owner]
    times = np.cumsum(rng.exponential(HOUR_US, count).astype(np.int64))
    times += START_US - times[ends - rows][owner]
    code = (rng.power(0.3, count) * CODES).astype(np.int32)
    code[number < 2] = CODES + 2 * number[number < 2] + rng.integers(0, 2, 2 * len(subjects))
    static, valued = number < 2, (number >= 2) & (rng.random(count) < 0.5)
    columns = {
        "subject_id": pa.array(subjects[owner]),
        "time": pa.array(times, pa.timestamp("us"), mask=static),
        "code": pa.DictionaryArray.from_arrays(pa.array(code), pa.array(names)).cast(pa.string()),
        "numeric_value": pa.array(rng.normal(size=count).astype(np.float32), mask=~valued),
    }
    if extras:
        late = times + 2 * HOUR_US * (rng.random(count) < 0.3)
        columns["available_time"] = pa.array(late, pa.timestamp("us"), mask=static)
        columns["hadm_id"] = pa.array(subjects[owner] * 1_000 + number // 50, mask=static)
    return pa.table(columns), times[ends - 1]


def record_lengths(subjects: int, seed: int = 0) -> np.ndarray:
    """Rows a subject: log-normal with median 400, 10 to 20,000."""
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(400), 1.0, subjects))
    return np.clip(drawn, 10, 20_000).astype(np.int64)
