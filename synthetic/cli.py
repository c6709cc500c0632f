"""Command line of the synthetic world: ``generate`` writes a source folder, ``oracle`` prints what no model can beat."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from mmjepa.progress import say, track
from mmjepa.refusal import Refusal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m synthetic",
        description="A synthetic paired CT + EHR world whose truth is known: make data, and the best score possible on it.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    generate = verbs.add_parser(
        "generate",
        help="write a source folder: records (MEDS 0.4), images, identities, labels, truth",
        description="Write a source folder that `mmjepa ingest` reads: ehr/ (MEDS 0.4), images/, identity/, labels/malignancy/, "
        "and truth/ for oracles alone. Whole or not at all; the bytes depend on preset, site, patients, seed and format, "
        "never on --workers.",
        epilog="example: python -m synthetic generate --site internal --patients 2000 --format nifti --out world/internal",
    )
    generate.add_argument(
        "--site",
        action="append",
        metavar="NAME",
        help="internal (default) or external (other label-pathway link and case mix); several for a cohort of several sites; "
        "a new name needs a --knob",
    )
    generate.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="[SITE.]K=V",
        help="turn a knob of every site, or of one: --knob spec=1.4 --knob east.rho=0",
    )
    generate.add_argument(
        "--patients", type=int, default=2000, metavar="N", help="subjects, one CT each (default 2000)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="the world and its subjects (default 0)")
    generate.add_argument(
        "--format", default="nifti", dest="image_format", metavar="F", help="of the images: nifti (default) or dicom"
    )
    generate.add_argument("--size", type=int, default=32, metavar="V", help="voxels a side: 32 (default), 48 or 64")
    generate.add_argument(
        "--scans",
        type=int,
        default=1,
        metavar="C",
        help="CTs a subject, 1 (default) to 3 in a year; the label stands at the last",
    )
    generate.add_argument(
        "--leak",
        action="append",
        default=[],
        metavar="NAME",
        help="plant a fault that an audit is due to find (see the README)",
    )
    generate.add_argument(
        "--out", required=True, type=Path, metavar="X", help="folder to write; must not hold anything yet"
    )
    generate.add_argument(
        "--workers", type=int, default=1, metavar="W", help=f"processes (default 1; this machine: {os.cpu_count()})"
    )
    bayes = verbs.add_parser(
        "oracle",
        help="print the AUC of the exact Bayes scores, inside and outside",
        description="AUC of the exact scores on fresh subjects, mean over seeds: env_bayes knows the site, source_bayes the "
        "internal site only, c_blind holds that the care pathway says nothing of the label.",
    )
    bayes.add_argument(
        "--patients", type=int, default=4000, metavar="N", help="subjects a site and seed (default 4000)"
    )
    bayes.add_argument("--seeds", type=int, default=8, metavar="K", help="seeds 0 .. K-1 (default 8)")
    for verb in (generate, bayes):
        verb.add_argument("--preset", default="li2025", help="the world's constants (default li2025)")
        verb.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output and nothing else"
        )
    return parser


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from synthetic import generate
    from synthetic.presets import find_sites

    result = generate(
        args.out,
        patients=args.patients,
        site=find_sites(args.preset, args.site or ["internal"], args.knob),
        preset=args.preset,
        seed=args.seed,
        image_format=args.image_format,
        workers=args.workers,
        size=args.size,
        scans=args.scans,
        leak=args.leak,
    )
    say(
        f"{result['out']}: {result['patients']} patients, {result['positives']} with cancer, {result['ehr_rows']} record rows"
    )
    say(f"Next: mmjepa ingest {result['out']} --out COHORT")
    return result


def _oracle(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from synthetic import oracle, presets

    if args.patients < 10 or args.seeds < 1:
        raise Refusal("SYNTHETIC_RANGE", "the oracle needs --patients of at least 10 and --seeds of at least 1")
    presets.find_preset(args.preset)
    result: dict[str, Any] = {"preset": args.preset, "patients": args.patients, "seeds": args.seeds, "sites": {}}
    for site in presets.SITES[args.preset]:
        rows = [
            oracle.table(args.preset, site, args.patients, seed) for seed in track(range(args.seeds), f"Site {site}")
        ]
        result["sites"][site] = {
            name: {"mean": float(np.mean([r[name] for r in rows])), "sd": float(np.std([r[name] for r in rows]))}
            for name in rows[0]
        }
    if not args.json:
        print(f"{'AUC, mean (sd) over seeds':<26}" + "".join(f"{site:>16}" for site in result["sites"]))
        for name in next(iter(result["sites"].values())):
            cells = (f"{s[name]['mean']:.3f} ({s[name]['sd']:.3f})" for s in result["sites"].values())
            print(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells))
    return result


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 refused, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        result = {"generate": _generate, "oracle": _oracle}[args.verb](args)
    except Refusal as refusal:
        say(str(refusal))
        return 2
    except OSError as error:
        say(f"FILE_ACCESS: {error.filename or args.verb}: {error.strerror or type(error).__name__}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; nothing was left behind")
        return 130
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0
