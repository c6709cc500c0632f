"""Checkpoints: everything that decides the next step, as safetensors and JSON, written aside and renamed.

A checkpoint is a folder ``step_<n>``: ``state.safetensors`` (weights, Adam's moments, teacher's shadows, random states of
every rank) and ``state.json`` (position, fingerprints, digest of the tensors). There is no pickle in it.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mmjepa.files import atomic_path, read_json, sha256, write_json
from mmjepa.refusal import Refusal

KEEP = 2


@dataclass
class State:
    """tensors: flat names, grouped by a prefix (``model/``, ``adam/``, ``teacher/``, ``random/``). facts: plain JSON values,
    among them ``step`` (optimiser steps done)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of one prefix, without it."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(f"{prefix}/")}


def save(folder: Path, state: State) -> Path:
    """Write ``folder/step_<n>`` whole or not at all, then drop all but the last two."""
    path = folder / f"step_{state.facts['step']:08d}"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.mkdir()
            tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", {**state.facts, "sha256": sha256(temporary / "state.safetensors")})
            _flush(temporary)
        _flush(folder)
    for old in found(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    for torn in folder.glob(".step_*.partial"):
        shutil.rmtree(torn, ignore_errors=True)
    return path


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def load_latest(folder: Path) -> State | None:
    """The newest checkpoint, or None. Raises Refusal ``CHECKPOINT_BROKEN`` when its bytes are not those written."""
    paths = found(folder)
    if not paths:
        return None
    try:
        facts = read_json(paths[-1] / "state.json")
    except Refusal:
        facts = None
    tensors = paths[-1] / "state.safetensors"
    if not isinstance(facts, dict) or not tensors.is_file() or sha256(tensors) != facts.get("sha256"):
        hint = f"Remove {paths[-1]} to go on from the checkpoint before it" if len(paths) > 1 else "Start a new run"
        raise Refusal("CHECKPOINT_BROKEN", f"{paths[-1]} was damaged after it was written", hint)
    return State(load_file(tensors), facts)


def _flush(folder: Path) -> None:
    for path in [*folder.glob("*"), folder]:
        if path.name.startswith("state.") or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
