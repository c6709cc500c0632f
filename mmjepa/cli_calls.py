"""What each verb calls: arguments in, one function of the package, its result and exit code out. Imports wait until they are needed."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjepa.console import Result
from mmjepa.refusal import Refusal

HELP = "See mmjepa ingest --help"
IMAGE_SETTINGS = ("crosswalk", "salt", "workers", "min_slices", "rescale", "tilt", "nifti_hu", "form")


def ingest(options: argparse.Namespace) -> Result:
    from mmjepa.ingest import explain, ingest, ingest_ct, ingest_ehr

    settings = {name: getattr(options, name) for name in IMAGE_SETTINGS}
    match options.source:
        case ["ct" | "ehr" as word, _] if options.ehr or options.ct:
            raise Refusal("USAGE", f"--ehr and --ct go with a whole source, not with {word}", HELP)
        case ["ehr", text]:
            _refuse_image_settings(settings, options)
            return ingest_ehr(Path(text), options.out), 0
        case ["ct", text]:
            images_alone, source = True, Path(text)
        case [] | [_]:
            images_alone, source = False, Path(options.source[0]) if options.source else None
        case _:
            stray = options.source[2 if options.source[0] in ("ct", "ehr") else 0]
            raise Refusal(
                "USAGE", f"{stray!r} is one word too many: want a source folder, or ct or ehr and a folder", HELP
            )
    if options.explain:
        identity = {name: settings[name] for name in ("crosswalk", "salt")}
        return explain(source, options.out, options.explain, ct=options.ct, **identity)
    if images_alone and source:
        images = result = ingest_ct(source, options.out, **settings)
    else:
        result = ingest(source, options.out, ehr=options.ehr, ct=options.ct, **settings)
        images = result.get("ct") or {}
    return result, 2 if images.get("accepted") == 0 else 0


def _refuse_image_settings(settings: Mapping[str, Any], options: argparse.Namespace) -> None:
    given = [name for name, value in settings.items() if value != options.of_images[name]]
    given += ["explain"] if options.explain else []
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise Refusal("USAGE", f"{flags}: of images, and ingest ehr reads records alone", HELP)


def label(options: argparse.Namespace) -> Result:
    from mmjepa.ehr.tasks import label

    return label(options.cohort, options.task, options.predicates, options.out, events=options.events)


def audit(options: argparse.Namespace) -> Result:
    from mmjepa.audit import audit

    given = {"run": options.run, "scores_file": options.scores, "oracle_file": options.oracle}
    result = audit(options.cohort, options.labels, **given)
    return result, int(result["verdict"] == "fail")


def forms(options: argparse.Namespace) -> Result:
    from mmjepa.ehr.show import show_forms

    where = {"stay": options.stay, "hours": options.hours, "names": options.names}
    return show_forms(options.cohort, options.subject, **where)


def doctor(options: argparse.Namespace) -> Result:
    from mmjepa.doctor import doctor

    result = doctor()
    return result, 2 if result["verdict"] == "broken" else 0


def pretrain(options: argparse.Namespace) -> Result:
    from mmjepa.pretrain import pretrain, read_config

    return pretrain(read_config(options.config, options.overrides))


def embed(options: argparse.Namespace) -> Result:
    from mmjepa.embed import embed

    return embed(options.run, options.cohort, options.out, untrained=options.untrained)


def evaluate(options: argparse.Namespace) -> Result:
    from mmjepa.evaluate.judge import evaluate_files

    return evaluate_files(
        options.embeddings,
        options.labels,
        outside=options.outside,
        outside_labels=options.outside_labels,
        train_limit=options.train_limit,
        seed=options.seed,
        draws=options.draws,
    )


def rollout(options: argparse.Namespace) -> Result:
    from mmjepa.embed import rollout_table

    return rollout_table(
        options.run,
        options.cohort,
        options.out,
        from_hour=options.from_hour,
        horizon=options.horizon,
        draws=options.draws,
    )


def plan(options: argparse.Namespace) -> Result:
    from mmjepa.plan import plan_file

    return plan_file(options.config, options.overrides)
