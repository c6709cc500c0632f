"""Pretrain a CT+EHR JEPA and judge it inside and outside: make or read the cohorts, audit, pretrain, embed, judge, report.

    python recipes/pretrain_ct_ehr.py --config recipes/configs/ct_ehr_demo.yaml [key=value ...]

Everything lands in the run folder ``out``; ``report.html`` is what to open. Run the same command again with resume=true and
it goes on where it stopped.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from mmjepa.audit import audit
from mmjepa.baselines import features
from mmjepa.cohort import Cohort
from mmjepa.config import build, load_yaml, override, resolved_yaml, to_plain
from mmjepa.console import recipe_parser, run_recipe
from mmjepa.ct.store import VolumeStore
from mmjepa.embed import embed
from mmjepa.engine.log import read_metrics
from mmjepa.evaluate.collapse import collapse_panel
from mmjepa.evaluate.judge import Arm, judge
from mmjepa.evaluate.probe import LinearProbe
from mmjepa.evaluate.tables import EmbeddingTable, ScoreTable, read_embeddings
from mmjepa.files import fresh_folder, read_json, write_json
from mmjepa.identity import salt_at
from mmjepa.ingest import ingest
from mmjepa.pairing import pair
from mmjepa.pretrain import RunConfig, pretrain
from mmjepa.progress import say
from mmjepa.refusal import Refusal
from mmjepa.report import write_report
from mmjepa.run import Run
from mmjepa.sample import CtEhrViews
from mmjepa.sample.images import order_images


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A site of the synthetic world. knobs: settings such as ``rho=0`` that make it another one. first: number of the first
    patient; two sites with the same numbers hold the same people."""

    site: str = "internal"
    knobs: tuple[str, ...] = ()
    patients: int = 1500
    first: int = 0
    seed: int = 0
    image_format: Literal["nifti", "dicom"] = "nifti"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a site's data come from: a finished ``cohort``; a ``source`` folder; ``ehr`` and ``ct`` with a ``crosswalk``; or
    the ``synthetic`` world."""

    cohort: Path | None = None
    source: Path | None = None
    ehr: Path | None = None
    ct: Path | None = None
    crosswalk: Path | None = None
    salt: Path | None = None
    synthetic: Synthetic | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """task: label task, None to stop after the embeddings. labelled: labelled subjects the probes may see. pretrain: the
    run's own config (``data`` and ``out`` are filled in here)."""

    out: Path
    inside: Site
    outside: Site | None = None
    task: str | None = None
    labelled: int | None = None
    question: str = "What does CT+EHR pretraining give?"
    pretrain: dict[str, Any] = field(default_factory=dict)
    draws: int = 2000
    workers: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        if min(self.draws, self.workers, 1 if self.labelled is None else self.labelled) < 1:
            raise ValueError(f"draws={self.draws}, workers={self.workers} and labelled={self.labelled} are at least 1")


def main(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """The whole recipe."""
    started = time.time()
    config = build(Experiment, override(load_yaml(arguments.config), arguments.overrides))
    settings = {**config.pretrain, "data": str(config.out / "inside"), "out": str(config.out / "run")}
    run_config = build(RunConfig, settings, "pretrain")
    enter(config)

    cohorts = {"inside": prepare(config, config.inside, "inside")}
    if config.outside is not None:
        cohorts["outside"] = prepare(config, config.outside, "outside")
    audits = {site: audit(path, [config.task] if config.task else None) for site, path in cohorts.items()}
    for site, found in audits.items():
        say(f"audit of {site}: {found['verdict']}")

    learn(run_config, cohorts["inside"])
    tables = {name: embed_sites(config, cohorts, untrained=name == "untrained") for name in ("jepa", "untrained")}
    assert isinstance(run_config.views, CtEhrViews)
    results = None if config.task is None else judge_arms(config, cohorts, tables, run_config.views)
    collapse = panels(tables)
    summary = {
        "run": str(config.out),
        "audit": {s: a["verdict"] for s, a in audits.items()},
        "volumes": volumes(cohorts),
    }
    if results is not None:
        summary["auroc"] = print_results(results)
    write_report(page(config, cohorts, audits["inside"], results, collapse, started), config.out / "report.html")
    say(f"the report: {config.out / 'report.html'}")
    return {**summary, "report": str(config.out / "report.html"), "seconds": round(time.time() - started, 1)}


def enter(config: Experiment) -> None:
    """A new folder, or with ``resume`` the one of the same experiment: only how it is judged may have changed."""
    if config.resume and (config.out / "experiment.yaml").is_file():
        old, new = load_yaml(config.out / "experiment.yaml"), to_plain(config)
        for key in ("inside", "outside", "pretrain"):
            if old.get(key) != new[key]:
                raise Refusal(
                    "CHECKPOINT_CONFIG",
                    f"{config.out} was started with another {key}",
                    f"See {config.out / 'experiment.yaml'}, or start another with out=",
                )
    else:
        fresh_folder(config.out, "folder")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "report.html").unlink(missing_ok=True)
    (config.out / "experiment.yaml").write_text(resolved_yaml(config))


def prepare(config: Experiment, site: Site, name: str) -> Path:
    """The site's cohort: generated and ingested where needed. What is there already is not done again."""
    if site.cohort is not None:
        return site.cohort
    source, cohort = site.source, config.out / name
    if site.synthetic is not None:
        from synthetic import generate
        from synthetic.presets import find_sites

        source = config.out / f"{name}_source"
        if not source.is_dir():
            made = site.synthetic
            say(f"{name}: {made.patients} synthetic patients of the {' '.join([made.site, *made.knobs])} site")
            generate(
                source,
                patients=made.patients,
                first=made.first,
                site=find_sites("li2025", [made.site], made.knobs),
                seed=made.seed,
                image_format=made.image_format,
                workers=config.workers,
            )
    salt = site.salt
    if salt is None and site.crosswalk is not None:
        salt = config.out / "salt.txt"  # outside the cohort, like the crosswalk
        salt_at(salt, cohort=cohort)
    found = ingest(
        source, cohort, ehr=site.ehr, ct=site.ct, crosswalk=site.crosswalk, salt=salt, workers=config.workers
    )
    write_json(config.out / f"{name}_ingest.json", found)
    say(
        f"{name}: {found['ct']['accepted']} volumes accepted, {sum(found['ct']['refused'].values())} refused, {found['subjects_with_both']} subjects with CT and record"
    )
    return cohort


def learn(config: RunConfig, cohort: Path) -> None:
    """Pretrain, unless the run is finished; go on with one that was stopped."""
    settled = Run(config.out)
    if (settled.model / "config.json").is_file():
        return
    started = settled.config.is_file()
    pretrain(replace(config, data=cohort, resume=started))


def embed_sites(config: Experiment, cohorts: dict[str, Path], *, untrained: bool) -> dict[str, EmbeddingTable]:
    """Embedding tables of all sites under the frozen (or never trained) encoders."""
    tables = {}
    for site, cohort in cohorts.items():
        path = config.out / f"{'untrained' if untrained else 'jepa'}_{site}.parquet"
        if not path.is_file():
            embed(config.out / "run", cohort, path, untrained=untrained)
        tables[site] = read_embeddings(path)
    return tables


def judge_arms(
    config: Experiment,
    cohorts: dict[str, Path],
    tables: dict[str, dict[str, EmbeddingTable]],
    views: CtEhrViews,
) -> dict[str, Any]:
    """Every arm on the same labelled subjects, the same evaluated rows and the same bootstrap draws."""
    assert config.task is not None
    opened = {site: Cohort.open(path) for site, path in cohorts.items()}
    labels = {site: cohort.labels(config.task) for site, cohort in opened.items()}
    plain = {name: baseline(name, opened, views) for name in ("image", "ehr_counts", "early_fusion")}
    tuned, free = LinearProbe, LinearProbe(C=1e4)
    arms = [
        arm("JEPA", tables["jepa"], tuned(), "latents of the pretrained CT and EHR encoders, frozen, side by side"),
        arm("untrained", tables["untrained"], tuned(), "the same encoders before any training"),
        arm("image-only", plain["image"], tuned(), "block means and histogram of the CT"),
        arm("EHR-only", plain["ehr_counts"], tuned(), "counts of codes and last laboratory values"),
        arm("fusion, unregularised", plain["early_fusion"], free, "image and EHR features together, almost no penalty"),
        arm(
            "fusion, tuned",
            plain["early_fusion"],
            tuned(),
            "the same features, penalty chosen inside the training subjects",
        ),
    ]
    oracle = {site: oracle_scores(config.out / f"{site}_source" / "truth" / "oracle.parquet") for site in cohorts}
    known = {site: scores for site, scores in oracle.items() if scores is not None}
    if len(known) == len(cohorts):
        arms.append(
            Arm(
                "oracle",
                known["inside"],
                known.get("outside"),
                says="knows how the world was made: no model can do better on average",
                oracle=True,
            )
        )
    results = judge(
        arms,
        labels["inside"],
        outside_labels=labels.get("outside"),
        reference="JEPA",
        train_limit=config.labelled,
        draws=config.draws,
    )
    write_json(config.out / "results.json", results)
    return results


def arm(name: str, tables: dict[str, EmbeddingTable], probe: LinearProbe, says: str) -> Arm:
    """An arm over the tables of the sites."""
    return Arm(name, tables["inside"], tables.get("outside"), probe, says)


def baseline(name: str, cohorts: dict[str, Cohort], views: CtEhrViews) -> dict[str, EmbeddingTable]:
    """Feature tables of a baseline, of the images that are embedded: fitted on the inside site's training subjects, reused
    as they are outside."""
    tables, state = {}, None
    for site, cohort in cohorts.items():
        events = cohort.events()
        index = VolumeStore(cohort.path).index
        rows, _ = pair(index, events, **vars(views.pairing))
        rows = order_images(rows, index, views.prefer_kernel).drop_duplicates(["subject_id", "prediction_time"])
        train = events.splits.get("train", np.empty(0, dtype=np.int64))
        tables[site], state = features(name, cohort, rows, train, state)
    return tables


def oracle_scores(path: Path) -> ScoreTable | None:
    """The synthetic world's exact log-odds, where there is such a world."""
    if not path.is_file():
        return None
    truth = pd.read_parquet(path)
    return ScoreTable(
        truth["subject_id"].to_numpy(),
        truth["prediction_time"].to_numpy(),
        truth["env_bayes_both"].to_numpy(),
        "log_odds",
    )


def panels(tables: dict[str, dict[str, EmbeddingTable]]) -> dict[str, Any]:
    """The collapse panel of each encoder, before and after training."""
    found: dict[str, Any] = {}
    if len(tables["jepa"]["inside"]) < 2:
        return found
    for part, name in enumerate(("CT encoder", "EHR encoder")):
        halves = {key: np.array_split(sites["inside"].z, 2, axis=1)[part] for key, sites in tables.items()}
        before = collapse_panel(halves["untrained"])
        found[f"untrained {name}"] = before
        found[f"pretrained {name}"] = collapse_panel(halves["jepa"], initial_std_q05=before["std_q05"])
    return found


def volumes(cohorts: dict[str, Path]) -> list[dict[str, Any]]:
    """The first volumes of each site, shown with their voxels."""
    shown = []
    for site, cohort in cohorts.items():
        for row in VolumeStore(cohort).index.head(3).to_dict("records"):
            shape, spacing = ([row[f"{what}_{axis}"] for axis in "xyz"] for what in ("shape", "spacing"))
            shown.append({"site": site, "image_id": row["image_id"], "shape": shape, "spacing_mm": spacing})
            voxels = f"{' x '.join(map(str, shape))} voxels of {' x '.join(f'{s:.3g}' for s in spacing)} mm"
            say(f"{site} volume {row['image_id']}: {voxels}, kernel {row['kernel'] or 'not told'}")
    return shown


def print_results(results: dict[str, Any]) -> dict[str, Any]:
    """The table of results, on standard error; returns AUROC by site and arm."""
    found: dict[str, Any] = {}
    for arm in results["arms"]:
        line = f"{arm['name']:<24}"
        for site, judged in results["sites"].items():
            auroc = judged["arms"][arm["name"]]["auroc"]
            found.setdefault(site, {})[arm["name"]] = auroc["value"]
            low, high = auroc["interval"]
            line += f"{site} {auroc['value']:.3f} ({low:.3f} to {high:.3f})   "
        say(f"{line}{arm['learner']}")
    return found


def page(
    config: Experiment,
    cohorts: dict[str, Path],
    audited: dict[str, Any],
    results: dict[str, Any] | None,
    collapse: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """What the report shows."""
    run_folder = Run(config.out / "run")
    facts = {
        **run_folder.saved_facts(),
        "seconds in all": round(time.time() - started),
        "processor cores": os.cpu_count(),
    }
    given = {
        "title": f"CT+EHR JEPA: {config.task or 'pretraining only'}",
        "question": config.question,
        "cohort": {site: flow(config, site, path) for site, path in cohorts.items()},
        "metrics": read_metrics(run_folder.metrics),
        "collapse": collapse,
        "audit": audited,
        "limits": LIMITS + (SYNTHETIC_LIMITS if config.inside.synthetic else []),
        "config_yaml": run_folder.config.read_text(),
        "facts": {name: value for name, value in facts.items() if not isinstance(value, Mapping)},
    }
    return given if results is None else {**given, "results": results}


LIMITS = [
    "Research software, not a medical device: nothing here may guide the care of a patient.",
    "One training seed. A difference between arms needs several seeds and an interval that excludes zero before it is called one.",
]
SYNTHETIC_LIMITS = [
    "The cohorts are synthetic; they test the machinery and say nothing about patients.",
    "Pretraining lasted minutes on a CPU, far too short for the encoders to be good.",
]


def flow(config: Experiment, site: str, cohort: Path) -> dict[str, Any]:
    """How many came in, and what became of them."""
    path = config.out / f"{site}_ingest.json"
    events = Cohort.open(cohort).events()
    steps: dict[str, Any] = {"subjects with a record": len(events.subjects)}
    if path.is_file():
        images = read_json(path)["ct"]
        steps |= {"CT volumes accepted": images["accepted"], "CT volumes refused": sum(images["refused"].values())}
        steps["subjects with CT and record"] = read_json(path)["subjects_with_both"]
    return steps | {f"subjects in {name}": len(members) for name, members in events.splits.items()}


if __name__ == "__main__":
    sys.exit(run_recipe(main, recipe_parser(__doc__)))
