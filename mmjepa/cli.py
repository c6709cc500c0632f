"""The verbs of ``mmjepa`` and their arguments.

``cli_arguments`` holds what they share, ``cli_calls`` what each calls, ``cli_show`` how its result is shown.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmjepa import __version__, cli_calls, cli_show
from mmjepa.cli_arguments import EXIT_CODES, config_arguments, hours, names, run_arguments, two_numbers, verb
from mmjepa.console import Result, run
from mmjepa.refusal import Refusal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal("USAGE", message, f"See {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments

    def call() -> Result:
        options = make_parser().parse_args(arguments)
        value = options.call(options)
        if not as_json:
            _show(options.show, value[0] if isinstance(value, tuple) else value)
        return value

    return run(call, as_json=as_json, debug="--debug" in arguments)


def _show(show: Callable[[Mapping[str, Any]], None], result: Mapping[str, Any]) -> None:
    try:
        show(result)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # who reads, such as head, has seen enough; what is still buffered must not fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="mmjepa",
        description="Joint-embedding predictive pretraining on CT scans and electronic health records.",
        epilog=f"{EXIT_CODES}. Every verb has its own --help with an example.",
    )
    parser.add_argument("--version", action="version", version=f"mmjepa {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _data_verbs(verbs)
    _model_verbs(verbs)
    return parser


def _data_verbs(verbs: Any) -> None:
    ingest = verb(
        verbs,
        "ingest",
        cli_calls.ingest,
        "read MEDS records and CT images into a cohort folder",
        "Reads a source folder (ehr/, images/, labels/, identity/), a bare MEDS root or a tree of DICOM/NIfTI files. A bad "
        "item is refused with a code and counted, never replaced. Run it again with the same --out: what is unchanged is "
        "not read twice. `mmjepa ingest ct SOURCE` takes the images alone and lists every volume, `mmjepa ingest ehr SOURCE` the "
        "records alone.",
        "mmjepa ingest source --out cohort",
        "a cohort: ehr/ (MEDS), ct/ (volumes, index, manifest), labels/, store/",
        show=cli_show.ingest,
    )
    ingest.add_argument(
        "source",
        nargs="*",
        metavar="[ct|ehr] SOURCE",
        help="the source folder; after `ct` its images alone, after `ehr` its records",
    )
    ingest.add_argument("--out", type=Path, required=True, help="the cohort folder, new or made by an earlier ingest")
    ingest.add_argument("--ehr", type=Path, help="a MEDS root, when it is not SOURCE/ehr")
    ingest.add_argument("--ct", type=Path, help="a tree of DICOM or NIfTI files, when it is not SOURCE/images")
    ingest.add_argument(
        "--crosswalk", type=Path, help="csv of patient_id, subject_id, date_shift_days (SOURCE/identity)"
    )
    ingest.add_argument(
        "--salt", type=Path, help="text file with the salt of hashed identifiers (beside the crosswalk)"
    )
    ingest.add_argument(
        "--explain",
        metavar="ID",
        help="read nothing in: list the files that an id in ct/manifest.csv stands for (they may identify; needs the salt)",
    )
    ingest.add_argument("--workers", type=int, default=1, help="processes that read images (default 1)")
    ingest.add_argument("--min-slices", type=int, default=4, help="fewest slices of a volume (default 4)")
    ingest.add_argument(
        "--rescale",
        type=two_numbers,
        metavar="SLOPE,INTERCEPT",
        help="for DICOM slices without rescale tags (refused)",
    )
    ingest.add_argument(
        "--tilt", choices=("refuse", "resample"), default="refuse", help="series of a tilted gantry (default refuse)"
    )
    ingest.add_argument(
        "--nifti-hu",
        choices=("auto", "as-is", "csv"),
        default="auto",
        help="NIfTI voxels are HU: where they look so (auto), always (as-is), by slope and intercept in images.csv (csv)",
    )
    ingest.add_argument(
        "--form", choices=("npy", "blosc2"), default="npy", help="how voxels are stored: npy is faster, blosc2 smaller"
    )
    ingest.set_defaults(of_images={name: ingest.get_default(name) for name in cli_calls.IMAGE_SETTINGS})

    label = verb(
        verbs,
        "label",
        cli_calls.label,
        "make labels from a task file",
        "Evaluates a task file in the language of ACES on the records of a cohort; datasets/*/tasks hold built-in ones. What of the "
        "language is not understood is refused. Who is lost before the outcome could be known is left out and counted. A bare "
        "MEDS root stays as it is: name --out.",
        "mmjepa label cohort --task datasets/mimic_iv/tasks/mortality_30d.yaml --predicates datasets/mimic_iv/predicates.yaml",
        "COHORT/labels/TASK: MEDS labels, flow.json (what each step leaves), task.json (what the audit reads)",
        show=cli_show.labels,
    )
    label.add_argument("cohort", type=Path, help="a cohort folder or a MEDS root")
    label.add_argument("--task", type=Path, required=True, help="the task file")
    label.add_argument("--predicates", type=Path, help="the file of the data set's predicates")
    label.add_argument("--events", type=Path, help="a parquet or csv of further events, such as given sepsis onsets")
    label.add_argument(
        "--out",
        type=Path,
        help="the folder to write (COHORT/labels/TASK; of a bare MEDS root it must be named); it must be new",
    )

    audit = verb(
        verbs,
        "audit",
        cli_calls.audit,
        "look for what would leak the answer into a cohort and its labels",
        "Checks splits, label times and windows, label-revealing codes, discharge-stamped rows, events after death, single "
        "features that give the label away, who was left out, images, fitted statistics. Each finding says what it counted and what to do. A failure exits with 1.",
        "mmjepa audit cohort --labels mortality",
        "one line a check: pass, warn, fail or not-applicable, a count, a sentence",
        show=cli_show.audit,
    )
    audit.add_argument("cohort", type=Path, help="a cohort folder or a MEDS root")
    audit.add_argument(
        "--labels",
        type=names,
        action="extend",
        metavar="TASK[,TASK]",
        help="tasks under COHORT/labels, with commas or given again (default: all of them)",
    )
    audit.add_argument("--run", type=Path, metavar="RUN", help="a trained run: does it see what comes after its time")
    audit.add_argument("--scores", type=Path, metavar="TABLE", help="a tuned model's score table, for checks 10 and 16")
    audit.add_argument(
        "--oracle", type=Path, metavar="TABLE", help="the best scores possible (synthetic), for check 16"
    )

    forms = verb(
        verbs,
        "forms",
        cli_calls.forms,
        "print some hours of one ICU stay in all four text and token forms beside the raw rows",
        "For checking by eye that the forms say what the records say. What is printed is the record of a person: no id "
        "and no date, but every code and value of these hours. Forms are fitted on the first 1,000 training subjects.",
        "mmjepa forms cohort --stay 0 --hours 0:6",
        "the raw rows, hourly text, daily text, joint tokens and ended encounters",
        show=cli_show.forms,
    )
    forms.add_argument("cohort", type=Path, help="a cohort folder or a MEDS root")
    forms.add_argument("--subject", type=int, help="whose record (default the first who has such a stay)")
    forms.add_argument("--stay", type=int, default=0, help="which ICU stay, from 0 (default 0)")
    forms.add_argument(
        "--hours",
        type=hours,
        default=(0, 1),
        metavar="A:B",
        help="from hour A to before hour B of it (default 0:1)",
    )
    forms.add_argument("--names", type=Path, help="csv of code, name, unit: readable names of codes")

    verb(
        verbs,
        "doctor",
        cli_calls.doctor,
        "check this installation and say what to do about what is missing",
        "Checks Python, package versions, threads, CUDA, DICOM decoders, torchvision and timm, disk space. Exits with 2 "
        "if something the core needs is broken, says limited if another part is.",
        "mmjepa doctor",
        "one line a part: OK, missing or broken, and what to do",
        show=cli_show.doctor,
    )


def _model_verbs(verbs: Any) -> None:
    pretrain = verb(
        verbs,
        "pretrain",
        cli_calls.pretrain,
        "pretrain a model as a config says",
        "Trains what the YAML config describes; key=value arguments override it (nested keys with dots). An existing run "
        "folder is never overwritten.",
        "mmjepa pretrain recipes/configs/ct_ehr_small.yaml seed=1",
        "a run folder: config.yaml, metrics.jsonl, checkpoints/, model/",
        show=cli_show.phases,
    )
    config_arguments(pretrain)

    embed = verb(
        verbs,
        "embed",
        cli_calls.embed,
        "write one latent vector per subject and prediction time",
        "Encodes each CT with its record, or each hour of a stay, with the model of a run, seeing only what was known then.",
        "mmjepa embed runs/demo cohort --out embeddings.parquet",
        "a parquet table: subject_id, prediction_time, split, z",
    )
    run_arguments(embed)
    embed.add_argument("--out", type=Path, required=True, help="the parquet file to write; it must not exist")
    embed.add_argument("--untrained", action="store_true", help="with the weights before training, as a baseline")

    evaluate = verb(
        verbs,
        "evaluate",
        cli_calls.evaluate,
        "judge an embedding table, ours or any other, against labels",
        "Fits a linear probe on the labelled subjects of train and tuning (its penalty chosen by folds of subjects inside them) "
        "and judges held_out, with intervals by subject; `tuned` is that probe, `weak` the same with almost no penalty.",
        "mmjepa evaluate embeddings.parquet --labels cohort/labels/malignancy --json > results.json",
        "AUROC by site; with --json every measure with its interval, the trivial baseline and the collapse panel",
        show=cli_show.evaluation,
    )
    evaluate.add_argument("embeddings", type=Path, help="parquet with subject_id, prediction_time and z")
    evaluate.add_argument("--labels", type=Path, required=True, help="a folder of MEDS label files")
    evaluate.add_argument("--outside", type=Path, help="the embedding table of another site, which tunes nothing")
    evaluate.add_argument("--outside-labels", type=Path, help="the label folder of that site")
    evaluate.add_argument("--train-limit", type=int, metavar="N", help="labelled subjects the probes may see (all)")
    evaluate.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (default 0)")
    evaluate.add_argument("--draws", type=int, default=2000, help="of the bootstrap over subjects (default 2000)")

    rollout = verb(
        verbs,
        "rollout",
        cli_calls.rollout,
        "let a trajectory model imagine the hours ahead and measure the drift",
        "Rolls the predictor forward from one hour of each held-out stay and compares with the encoder's own later latents, "
        "beside forecasts that cost nothing (copy, climatology).",
        "mmjepa rollout runs/trajectory cohort --out rollout.csv",
        "error and skill at each horizon with intervals, for recorded, held and no actions",
        show=cli_show.rollout,
    )
    run_arguments(rollout)
    rollout.add_argument("--out", type=Path, help="a csv file to write the table to; it must not exist")
    rollout.add_argument("--from-hour", type=int, default=24, help="hours of a stay that are known (default 24)")
    rollout.add_argument("--horizon", type=int, default=48, help="hours to roll over (default 48)")
    rollout.add_argument("--draws", type=int, default=2000, help="of the bootstrap over subjects (default 2000)")

    plan = verb(
        verbs,
        "plan",
        cli_calls.plan,
        "say what a config would train, how large and at what cost",
        "Resolves the config, counts parameters and steps, estimates memory and work; needs neither data nor weights.",
        "mmjepa plan recipes/configs/ct_ehr_small.yaml",
        "parameters by part, phases, memory, FLOPs, and the assumptions behind them",
    )
    config_arguments(plan)


if __name__ == "__main__":
    sys.exit(main())
