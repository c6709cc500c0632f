"""Pretrain a trajectory JEPA on the ICU stays of a MEDS cohort, then roll held-out stays forward and judge the drift.

    python recipes/pretrain_trajectory.py --config recipes/configs/clin_jepa_mimic_demo.yaml data=MEDS_FOLDER [key=value ...]

Everything lands in the run folder ``out``; ``report.html`` is what to open. Run the same command again with resume=true and
it goes on where it stopped.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from mmjepa.audit import audit
from mmjepa.cohort import Cohort
from mmjepa.console import recipe_parser, run_recipe
from mmjepa.embed import embed, rollout_table
from mmjepa.engine.log import read_metrics
from mmjepa.evaluate.collapse import collapse_panel
from mmjepa.evaluate.tables import read_embeddings
from mmjepa.files import write_json
from mmjepa.pretrain import RunConfig, pretrain, read_config
from mmjepa.progress import say
from mmjepa.report import write_report
from mmjepa.run import Run

HOURS = (1, 6, 12, 24, 48)
SPLITS = ("tuning", "held_out")  # neither is trained on


def main(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """The whole recipe."""
    started = time.time()
    config = read_config(arguments.config, arguments.overrides)
    folder = Run(config.out)
    audited = audit(config.data)
    say(f"audit: {audited['verdict']} (what the hourly text leaves out is said in the report)")

    phases = pretrain(config)["phases"]
    show_phases(phases)
    rolled = rollout_table(
        config.out, config.data, from_hour=arguments.from_hour, horizon=arguments.horizon, splits=SPLITS
    )
    show_rollout(rolled)
    write_json(config.out / "rollout.json", rolled)
    collapse = panels(config)
    folder.report.unlink(missing_ok=True)
    write_report(page(config, audited, rolled, collapse, started), folder.report)
    say(f"the report: {folder.report}")
    return {
        "run": str(config.out),
        "phases": len(phases),
        "rollout": rolled["summary"],
        "report": str(folder.report),
        "seconds": round(time.time() - started, 1),
    }


def show_phases(phases: list[dict[str, Any]]) -> None:
    """What each phase trained, by tensor name, and what it left alone."""
    for phase in phases:
        say(
            f"\n{phase['phase']}: {phase['steps']} updates; teacher {phase['teacher']}{', synchronised' if phase['sync'] else ''}; gap {phase['teacher_gap']:.3g}"
        )
        for part, trained in phase["trained"].items():
            names = trained["tensors"]
            more = f", ... {names[-1]}" if len(names) > 2 else ""
            say(
                f"  trained {part}: {len(names)} tensors, {trained['parameters']:,} parameters: {', '.join(names[:2])}{more}"
            )
        frozen = [part for part, entry in phase["frozen"].items() if entry["bit_equal"]]
        say(f"  bit-equal before and after: {', '.join(frozen) or 'none'}")


def show_rollout(rolled: dict[str, Any]) -> None:
    """Error and skill by horizon, the model beside copy-forward and climatology."""
    for actions, summary in rolled["summary"].items():
        say(f"\nactions {actions}, from hour {rolled['from_hour']}, splits {', '.join(rolled['splits'])}")
        say(
            f"{'h':>3} {'stays':>6} {'subjects':>9}   {'model D':<26} {'copy D':<8} {'climatology D':<14} {'MASE':<26} skill"
        )
        rows = [row for row in rolled["table"] if row["actions"] == actions and row["cohort"] == "shrinking"]
        for hour in HOURS:
            at = {row["forecast"]: row for row in rows if row["h"] == hour}
            if at:
                model, copied, usual = at["model"], at["copy_forward"]["D"], at["climatology"]["D"]
                line = (
                    f"{hour:>3} {model['windows']:>6} {model['subjects']:>9}   {_with(model, 'D'):<26} {copied:<8.3f} "
                )
                say(line + f"{usual:<14.3f} {_with(model, 'mase'):<26} {_with(model, 'skill')}")
        drift = summary["drift"]["shrinking"]
        say("drift to the last hour: " + ", ".join(f"{name} {_percent(entry)}" for name, entry in drift.items()))
    say("few stays: the intervals are wide and nothing here ranks methods")


def _with(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None or row[f"{name}_low"] is None:
        return "-" if row[name] is None else f"{row[name]:.3f}"
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def _percent(entry: dict[str, Any]) -> str:
    interval = entry["interval"]
    return f"{entry['value']:+.0f} %" + (f" ({interval[0]:+.0f} to {interval[1]:+.0f})" if interval else "")


def panels(config: RunConfig) -> dict[str, Any]:
    """The collapse panel of the state latents, before and after training; subjects are the classes."""
    found, before = {}, None
    for name in ("untrained", "pretrained"):
        path = config.out / f"states_{name}.parquet"
        if not path.is_file():
            embed(config.out, config.data, path, untrained=name == "untrained")
        table = read_embeddings(path)
        found[name] = collapse_panel(table.z, table.subject_id, initial_std_q05=before)
        before = found[name]["std_q05"]
    return found


def page(
    config: RunConfig, audited: dict[str, Any], rolled: dict[str, Any], collapse: dict[str, Any], started: float
) -> dict[str, Any]:
    """What the report shows."""
    folder = Run(config.out)
    facts = folder.saved_facts()
    events = Cohort.open(config.data).events()
    flow = {
        "subjects": len(events.subjects),
        "events": len(events.codes),
        **{k: v for k, v in facts["sampling"].items() if not isinstance(v, Mapping)},
    }
    recorded = [row for row in rolled["table"] if row["actions"] == "recorded"]
    return {
        "title": "Trajectory JEPA: five phases, then a rollout",
        "question": (
            f"After {rolled['from_hour']} hours of an ICU stay, how well does the model foretell the later states, hour by hour, "
            "feeding its own predictions back? Beside it stand forecasts that cost nothing."
        ),
        "cohort": {"training": flow},
        "metrics": read_metrics(folder.metrics),
        "collapse": collapse,
        "rollout": {
            "table": recorded,
            "summary": rolled["summary"]["recorded"],
            "actions": (
                "the recorded ones: the model is told what will be done, which is privileged knowledge of the future. "
                f"Judged on the splits {' and '.join(SPLITS)}, on which nothing was trained"
            ),
        },
        "audit": audited,
        "limits": LIMITS,
        "config_yaml": folder.config.read_text(),
        "facts": {
            **{k: v for k, v in facts.items() if not isinstance(v, Mapping)},
            "seconds in all": round(time.time() - started),
            "processor cores": os.cpu_count(),
        },
    }


LIMITS = [
    "Research software, not a medical device: nothing here may guide the care of a patient.",
    "A few stays only: the intervals are wide, and no claim about methods can come of them.",
    "The language model is small and random at the start; the phases are a hundredth of their published length.",
    "Drift alone ranks nothing: a forecast that foretells nothing (climatology) has next to none.",
]


if __name__ == "__main__":
    parser = recipe_parser(__doc__)
    parser.add_argument("--from-hour", type=int, default=24, help="hours of a stay that are known (24)")
    parser.add_argument("--horizon", type=int, default=48, help="hours to roll forward (48)")
    sys.exit(run_recipe(main, parser))
