"""A run: a folder with the resolved config, metrics, checkpoints, model and report."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmjepa import __version__
from mmjepa.config import load_yaml
from mmjepa.engine import checkpoint
from mmjepa.files import atomic_path, fresh_folder, read_json, write_json
from mmjepa.refusal import Refusal

# keys that say where and how to run, but decide no bit of the result
FREE_KEYS = (
    "out",
    "resume",
    "strict",
    "engine.workers",
    "engine.checkpoint",
    "engine.log",
    "engine.threads",
    "engine.device",
)


class Run:
    """Paths of a run folder and the rules of entering it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fingerprints: dict[str, str] = {}

    config = property(lambda self: self.folder / "config.yaml")
    audit = property(lambda self: self.folder / "audit.json")
    facts = property(lambda self: self.folder / "run.json")
    metrics = property(lambda self: self.folder / "metrics.jsonl")
    phases = property(lambda self: self.folder / "phases.json")
    checkpoints = property(lambda self: self.folder / "checkpoints")
    model = property(lambda self: self.folder / "model")
    report = property(lambda self: self.folder / "report.html")

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any]) -> "Run":
        """A new run. Raises Refusal ``OUTPUT_EXISTS`` when the folder holds anything."""
        run = cls(fresh_folder(folder, "run"))
        with atomic_path(run.config) as temporary:  # first and whole: from here on the run can be resumed
            temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        run._furnish()
        return run

    def _furnish(self) -> None:
        self.checkpoints.mkdir(exist_ok=True)
        if not self.facts.is_file():
            write_json(self.facts, {"mmjepa": __version__, "commit": _commit(), "cores": os.cpu_count()})

    @classmethod
    def resume(cls, folder: Path, config: Mapping[str, Any]) -> "Run":
        """An existing run of the same config. Raises Refusal ``RUN_MISSING`` or ``CHECKPOINT_CONFIG``, which names the keys
        that differ."""
        run = cls.open(folder)
        old, new = _flat(run.saved_config()), _flat(config)
        differing = sorted(k for k in old.keys() | new.keys() if k not in FREE_KEYS and old.get(k) != new.get(k))
        if differing:
            key = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise Refusal(
                "CHECKPOINT_CONFIG",
                f"{folder} was started with another config: {key} was {old.get(key)!r}, now {new.get(key)!r}{more}",
                "Resume with the config of that run, or start another with out=",
            )
        run._furnish()
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """An existing run. Raises Refusal ``RUN_MISSING``."""
        run = cls(Path(folder))
        if not run.config.is_file():
            raise Refusal(
                "RUN_MISSING",
                f"{folder} is not a run folder (no config.yaml)",
                "Name the folder that pretraining wrote",
            )
        return run

    def latest(self, ranks: int) -> checkpoint.State | None:
        """The newest checkpoint, if it belongs to this data and this number of ranks."""
        state = checkpoint.load_latest(self.checkpoints)
        if state is None:
            return None
        for name, value in self.fingerprints.items():
            if state.facts.get(name) != value:
                raise Refusal(
                    "CHECKPOINT_DATA",
                    f"the {name} of {self.folder} is not the one it was trained on",
                    "Resume on the unchanged data, or start another run with out=",
                )
        if state.facts["ranks"] != ranks:
            raise Refusal(
                "CHECKPOINT_RANKS",
                f"{self.folder} ran on {state.facts['ranks']} ranks, not {ranks}",
                "Resume on as many ranks",
            )
        return state

    def saved_config(self) -> dict[str, Any]:
        """The resolved config as plain values."""
        return load_yaml(self.config)

    def saved_facts(self) -> dict[str, Any]:
        """Version, commit and fingerprints."""
        return read_json(self.facts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _commit() -> str | None:
    """The commit of the code, where it runs from a checkout."""
    try:
        here = Path(__file__).parent
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
