"""``metrics.jsonl``: one row a step, fetched from the device only every few steps."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmjepa.engine.start import World
from mmjepa.files import atomic_path
from mmjepa.refusal import Refusal


class MetricsLog:
    """Rows wait as tensors until ``flush``; a step itself never waits for the device."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def add(self, facts: dict[str, Any], terms: dict[str, Tensor]) -> None:
        """Remember a step's row. facts: plain values; terms: scalars whose mean over ranks is the value."""
        self.pending.append((facts, {name: value.detach().float() for name, value in terms.items()}))

    def flush(self) -> float:
        """Write what waits; returns the last loss. Raises Refusal ``LOSS_NOT_FINITE``."""
        if not self.pending:
            return float("nan")
        names = [list(terms) for _, terms in self.pending]
        flat = self.world.mean(torch.stack([value for _, terms in self.pending for value in terms.values()]))
        values, rows = iter(flat.tolist()), []
        for (facts, _), keys in zip(self.pending, names, strict=True):
            rows.append({**facts, **{key: next(values) for key in keys}})
        self.pending.clear()
        if self.world.first:
            with open(self.path, "a") as handle:
                handle.writelines(json.dumps(row) + "\n" for row in rows)
                handle.flush()
                os.fsync(handle.fileno())
        for row in rows:
            bad = [name for name in row if name.split(".")[0] in ("loss", "gradient") and not math.isfinite(row[name])]
            if not bad:
                continue
            raise Refusal(
                "LOSS_NOT_FINITE",
                f"the {bad[0]} is {row[bad[0]]} at step {row['step']} ({row['phase']})",
                "Lower optim.lr, or look at the terms in metrics.jsonl; the last checkpoint is from before it",
            )
        return rows[-1]["loss"]

    def rewind(self, step: int) -> None:
        """Drop the rows after a step, and a torn last line: what a resumed run will write again."""
        if self.world.first and self.path.exists():
            kept = [
                line
                for line in self.path.read_text(errors="replace").splitlines()
                if (row := _parse(line)) and row["step"] <= step
            ]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows."""
    return (
        [row for line in path.read_text(errors="replace").splitlines() if (row := _parse(line))]
        if path.exists()
        else []
    )


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
