"""Building the store from MEDS shards: rows a second of CPU time and peak memory, at 5 to 40 million rows.

Each build is a process of its own, one thread; reading, checking, hashing and writing counted, start and imports not. ``one
row group``: all rows in one file of one row group. ``extras``: with admissions and late rows, which are put in order.
``growth_mib``: peak anonymous memory at 40 million rows over that at 5 million, and likewise of one row group at 20 million.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ehr_parts.common import Options, in_child, line, write_world
from mmjepa.ehr.store import EventStore

GOAL = 3.0  # million rows a second
MOST_MIB = 50
ROWS = 200  # a subject


def run(options: Options) -> Iterator[dict[str, Any]]:
    scale = 0.01 if options.small else 1.0
    whole: dict[str, Any] = {"shards": 1, "row_group": 1 << 26}
    settings: list[tuple[str, int, dict[str, Any]]] = [
        ("5 M rows, 8 shards", 5_000_000, {}),
        ("40 M rows, 40 shards", 40_000_000, {"shards": 40}),
        ("5 M rows, one row group", 5_000_000, whole),
        ("20 M rows, one row group", 20_000_000, whole),
        ("5 M rows, 8 shards, extras", 5_000_000, {"extras": True}),
    ]
    root = options.scratch / "build"
    peaks = []
    for name, rows, kind in settings:
        write_world(root, np.full(int(rows * scale) // ROWS, ROWS - 2), **kind)
        found = _built(options, root, name)
        peaks.append(found["peak_anonymous_mib"])
        yield found
    growth = [peaks[1] - peaks[0], peaks[3] - peaks[2]]
    yield line("build", growth_mib=growth, at_most=MOST_MIB, met=max(growth) <= MOST_MIB)
    if options.mimic is not None:
        yield _built(options, options.mimic, "MIMIC-IV demo")


def _built(options: Options, root: Path, name: str) -> dict[str, Any]:
    found = in_child("build", "once", root, options.scratch / "build_store")
    speed = found["rows"] / found["cpu_s"] / 1e6
    return line("build", speed, GOAL, unit="million rows a CPU second", world=name, **found)


def once(root: str, folder: str) -> dict[str, Any]:
    """One build, after a tiny one that loads what is loaded late."""
    tiny = write_world(Path(folder).with_name("build_tiny"), np.array([5]), shards=1)
    EventStore.build(tiny, Path(folder).with_name("build_tiny_store"))
    cpu, wall = time.process_time(), time.perf_counter()
    store = EventStore.build(root, folder)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"rows": len(store.codes) + len(store.static_codes), "cpu_s": cpu, "wall_s": wall}
