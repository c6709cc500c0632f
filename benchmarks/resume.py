"""One pretraining killed ten times by SIGKILL and resumed each time, against the same pretraining never stopped.

What runs: ``mmjepa pretrain benchmarks/resume.yaml``, a process of its own every time, on a cohort of 40 synthetic patients:
warm-up with an online teacher, joint training with an EMA teacher, alignment to a frozen teacher, a hard synchronisation
of 0 steps, finalisation. Dropout, noise and two micro-batches a step, so that random states matter.

The kills, in one chain on one run folder:

- six at random: the parent waits until a keyed random step is in metrics.jsonl, then for a keyed random share of one and a
  half steps, and kills the process with whatever it is doing;
- two inside the writing of a checkpoint: half of the tensors' bytes are on the disk; all bytes are, but the rename is not;
- two at a phase boundary: after the last step of a phase but before its checkpoint; after the hard synchronisation.

The four forced kills need the exact moment, so this file starts those processes as ``resume.py victim``, which wraps one
function of mmjepa in "send SIGKILL to myself here" and then calls the same command line. The library has no hook.

A kill counts as bit-identical when (a) the checkpoint that the next process goes on from holds the bytes of the
uninterrupted run's checkpoint of that step (weights, Adam's moments, teacher, random state, facts), (b) so does every
checkpoint that this next process writes, and (c) every row of metrics that it writes equals the uninterrupted row in all
fields but the timing. If the chain does not end in the uninterrupted run's final weights, last checkpoint, phase report and
metrics, no kill counts. To compare, the parent hard-links every checkpoint of both runs as it appears; it changes neither.

A resume is asked to start past step 0 and to repeat no more steps than lie between two checkpoints. The last line on
standard output is one JSON object; the table goes to standard error.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmjepa.keyed import generator

CONFIG = Path(__file__).with_suffix(".yaml")
TIMING = ("seconds", "items_per_second")
Row = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """kind: how. step: the last step that is in metrics.jsonl when it comes. wait: seconds after that, for a random one."""

    kind: str
    step: int
    wait: float = 0.0


@dataclass
class Trial:
    """What one kill did. resumed_after: step of the checkpoint that the next process went on from."""

    kill: str
    killed_after: int
    resumed_after: int = -1
    repeated: int = -1
    landed: bool = False
    same_start: bool = False
    same_checkpoints: bool = False
    same_rows: bool = False

    @property
    def bit_identical(self) -> bool:
        """Start, rows and checkpoints all equal the uninterrupted run's."""
        return self.same_start and self.same_checkpoints and self.same_rows


# ---- the process that is to die -------------------------------------------------------------------------------------


def victim(kind: str, step: int, arguments: list[str]) -> int:
    """``mmjepa`` with one function wrapped, so that the process kills itself at an exact moment."""
    from mmjepa import cli
    from mmjepa.engine import checkpoint, loop

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save_file, flush, leave = checkpoint.save_file, checkpoint._flush, loop.Engine._leave

    def half_written(tensors: dict[str, Any], path: Path) -> None:
        save_file(tensors, path)
        if f"step_{step:08d}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def not_renamed(folder: Path) -> None:
        flush(folder)
        if f"step_{step:08d}" in folder.name:
            die()

    def leaving(engine: Any, phase: Any) -> None:
        if kind == "before the phase's checkpoint" and engine.done == step and phase.steps:
            die()
        leave(engine, phase)
        if kind == "after the hard sync" and phase.sync:
            die()

    if kind == "checkpoint half written":
        checkpoint.save_file = half_written  # type: ignore[assignment]
    elif kind == "checkpoint not renamed":
        checkpoint._flush = not_renamed
    else:
        loop.Engine._leave = leaving  # type: ignore[method-assign]
    return cli.main(arguments)


# ---- the parent -----------------------------------------------------------------------------------------------------


class Watched:
    """A run folder, and hard links to every checkpoint that ever appeared in it."""

    def __init__(self, run: Path, kept: Path) -> None:
        self.run, self.kept = run, kept
        self.data = run.parent / "cohort"

    def start(self, *, resume: bool, kill: Kill | None = None) -> subprocess.Popen[bytes]:
        """Start the command line; its progress goes to a log beside the run."""
        arguments = ["pretrain", str(CONFIG), f"data={self.data}", f"out={self.run}", f"resume={str(resume).lower()}"]
        command = [str(Path(sys.executable).with_name("mmjepa"))]
        if kill is not None and kill.kind != "random":
            command = [sys.executable, __file__, "victim", kill.kind, str(kill.step)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.run.with_suffix(".log"), "ab") as log:
            return subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environment)

    def tail(self) -> str:
        """The end of what the processes said."""
        return self.run.with_suffix(".log").read_text()[-2000:]

    def follow(self, process: subprocess.Popen[bytes], until: Callable[[], bool] = lambda: False) -> None:
        """Link checkpoints until the process ends or ``until`` is true."""
        while process.poll() is None and not until():
            self.collect()
            time.sleep(0.002)
        self.collect()

    def collect(self) -> None:
        """Link what is new. A later writing of the same step is linked beside the first."""
        for folder in self.checkpoints():
            if self.run.joinpath("checkpoints", folder.name, "state.json").is_file():
                copy = self.kept / folder.name / str(folder.stat().st_ino)
                if not copy.is_dir():
                    copy.mkdir(parents=True)
                    for file in folder.iterdir():
                        os.link(file, copy / file.name)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints in the run folder, oldest first."""
        return sorted(self.run.joinpath("checkpoints").glob("step_*"))

    def last_step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        return step_of(self.checkpoints()[-1].name) if self.checkpoints() else 0

    def names(self) -> set[str]:
        """Names of all checkpoints that ever appeared."""
        return {folder.name for folder in self.kept.glob("step_*")}

    def written(self) -> set[Path]:
        """Links made so far, one folder a writing."""
        return set(self.kept.glob("step_*/*"))

    def rows(self) -> list[Row]:
        """Whole rows of metrics."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reached(self, step: int) -> bool:
        """Whether a step is in the metrics."""
        path = self.run / "metrics.jsonl"
        return path.is_file() and path.read_bytes().count(b"\n") >= step


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step_"))


def untimed(rows: list[Row]) -> list[Row]:
    """Rows without their timing."""
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def same_files(one: Path, other: Path, pattern: str = "*") -> bool:
    """Whether two folders hold the same files (of a pattern) with the same bytes."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob(pattern) if p.is_file()) for f in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def same_as(reference: Watched, folder: Path, step: str) -> bool:
    """Whether a checkpoint equals the uninterrupted run's of that step, byte for byte."""
    twins = sorted(reference.kept.joinpath(step).glob("*"))
    return len(twins) == 1 and same_files(folder, twins[0])


def planned(seed: int, count: int, config: dict[str, Any], rows: list[Row]) -> list[Kill]:
    """The kills in the order of their steps: four forced, the rest at keyed random steps past the first checkpoint (and
    not so near before a forced one or the end that a slow parent would come too late)."""
    interval = config["engine"]["checkpoint"]
    ends, done = {}, 0
    for phase in config["curriculum"]:
        done += phase["steps"]
        ends[phase["name"]] = done
    kills = [
        Kill("checkpoint half written", 4 * interval),
        Kill("before the phase's checkpoint", ends["joint"]),
        Kill("after the hard sync", ends["hard sync"]),
        Kill("checkpoint not renamed", ends["hard sync"] + interval - ends["hard sync"] % interval),
    ]
    taken = {step - back for step in [*(kill.step for kill in kills), done] for back in range(5)}
    free = [step for step in range(interval + 1, done) if step not in taken]
    rng = generator(seed, "kills")
    pace = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    steps = rng.choice(free, size=count - len(kills), replace=False).tolist()
    kills += [Kill("random", step, float(rng.uniform(0, 1.5 * pace))) for step in steps]
    return sorted(kills, key=lambda kill: kill.step)


def chain(run: Watched, reference: Watched, kills: list[Kill]) -> list[Trial]:
    """Start, kill, resume, kill, ... and let the last resume finish."""
    trials: list[Trial] = []
    written: set[Path] = set()
    for number in range(len(kills) + 1):
        kill = kills[number] if number < len(kills) else None
        start, before = run.last_step(), len(run.rows())
        if trials:
            trials[-1].resumed_after, trials[-1].repeated = start, before - start
            trials[-1].same_start = same_as(reference, run.checkpoints()[-1], run.checkpoints()[-1].name)
        process = run.start(resume=number > 0, kill=kill)
        if kill is None or kill.kind != "random":
            run.follow(process)
        else:
            # rows past the checkpoint are dropped first, so that an old row cannot stand for a new one
            run.follow(process, lambda start=start: len(run.rows()) == start)
            run.follow(process, lambda kill=kill: run.reached(kill.step))
            time.sleep(kill.wait)
            process.kill()
        code = process.wait()
        run.collect()
        if code != (0 if kill is None else -signal.SIGKILL):
            raise SystemExit(f"process {number} ended with {code}:\n{run.tail()}")
        rows = run.rows()
        if trials:
            expected = untimed(reference.rows())
            trials[-1].same_rows = untimed(rows)[start:] == expected[start : len(rows)]
            new = {folder.parent.name: folder for folder in run.written() - written}
            due = {name for name in reference.names() if start < step_of(name) <= run.last_step()}
            same = all(same_as(reference, folder, name) for name, folder in new.items())
            trials[-1].same_checkpoints = same and due == new.keys()
        written = run.written()
        if kill is not None:
            torn = list(run.run.joinpath("checkpoints").glob(".step_*.partial"))
            landed = bool(torn) if kill.kind.startswith("checkpoint") else len(rows) >= kill.step
            trials.append(Trial(kill.kind, len(rows), landed=landed))
            say(f"kill {number + 1}: {kill.kind}, after step {len(rows)}, newest checkpoint {run.last_step()}")
    return trials


def measure(work: Path, seed: int, count: int) -> dict[str, Any]:
    """Make the cohort, the uninterrupted run and the killed one; compare."""
    import torch
    import yaml

    from mmjepa.ingest import ingest
    from synthetic import generate

    generate(work / "source", patients=40, seed=seed)
    ingest(work / "source", out=work / "cohort")
    reference, run = Watched(work / "whole", work / "whole.kept"), Watched(work / "killed", work / "killed.kept")
    started = time.perf_counter()
    process = reference.start(resume=False)
    reference.follow(process)
    whole_seconds = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"the uninterrupted run failed:\n{reference.tail()}")
    say(f"uninterrupted: {len(reference.rows())} steps in {whole_seconds:.1f} s")
    config = yaml.safe_load(CONFIG.read_text())
    started = time.perf_counter()
    trials = chain(run, reference, planned(seed, count, config, reference.rows()))
    final = {
        "metrics": untimed(run.rows()) == untimed(reference.rows()),
        "weights": same_files(run.run / "model", reference.run / "model", "*.safetensors"),
        "checkpoint": same_as(reference, run.checkpoints()[-1], reference.checkpoints()[-1].name),
        "phases": run.run.joinpath("phases.json").read_bytes() == reference.run.joinpath("phases.json").read_bytes(),
    }
    return {
        "benchmark": "resume",
        "kills": len(trials),
        "bit_identical": sum(trial.bit_identical for trial in trials) if all(final.values()) else 0,
        "landed": sum(trial.landed for trial in trials),
        "resumed_past_zero": sum(trial.resumed_after > 0 for trial in trials),
        "checkpoint_interval_steps": config["engine"]["checkpoint"],
        "most_repeated_steps": max(trial.repeated for trial in trials),
        "steps": len(reference.rows()),
        "final_identical": final,
        "trials": [{**asdict(trial), "bit_identical": trial.bit_identical} for trial in trials],
        "seconds_uninterrupted": round(whole_seconds, 1),
        "seconds_killed_and_resumed": round(time.perf_counter() - started, 1),
        "seed": seed,
        "torch": torch.__version__,
        "threads": 1,
    }


def table(result: dict[str, Any]) -> str:
    """The kills, one a line."""
    lines = [f"{'kill':<31}{'after step':>11}{'resumed after':>15}{'repeated':>10}{'bit-identical':>15}"]
    for trial in result["trials"]:
        lines.append(
            f"{trial['kill']:<31}{trial['killed_after']:>11}{trial['resumed_after']:>15}{trial['repeated']:>10}"
            f"{'yes' if trial['bit_identical'] else 'NO':>15}"
        )
    return "\n".join(lines)


def say(line: str) -> None:
    """A line to a person."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """0 when every kill landed, was resumed past step 0 within one interval, and ended in the same bits; else 1."""
    if sys.argv[1:2] == ["victim"]:
        return victim(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="four of them forced (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the cohort and of the random moments (default 0)")
    options = parser.parse_args()
    if options.kills < 4:
        parser.error("--kills must be at least 4: four are forced")
    with tempfile.TemporaryDirectory(prefix="mmjepa-resume-") as work:
        result = measure(Path(work), options.seed, options.kills)
    say(table(result))
    print(json.dumps(result))
    whole = result["landed"] == result["resumed_past_zero"] == result["bit_identical"] == result["kills"]
    return 0 if whole and result["most_repeated_steps"] <= result["checkpoint_interval_steps"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
