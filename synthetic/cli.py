"""Command line of the synthetic world: make it, ask what is possible in it, see arms fail in it, look at it."""

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, NoReturn

from mmjepa.progress import say
from mmjepa.refusal import Refusal

_IMAGE_OPTIONS = ("image_format", "size", "scans", "leak")
_SPELT = {"image_format": "format"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _new_path(text: str) -> Path:
    """A path that a finished file or folder can be renamed to."""
    path = Path(text)
    if not path.name or path.is_symlink() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} names no new file or folder")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m synthetic",
        description="A synthetic paired CT + EHR world whose truth is known: make data, and the best score possible on it.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_generate, _add_oracle, _add_shift, _add_look):
        verb = add(verbs)
        verb.add_argument(
            "--preset",
            default="li2025",
            help="the world's constants: li2025 (default), groups (age and sex matter) or base",
        )
        verb.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output and nothing else"
        )
    return parser


def _add_generate(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "generate",
        help="write a source folder: records (MEDS 0.4), images, identities, labels, truth",
        description="Write a source folder that `mmjepa ingest` reads: ehr/ (MEDS 0.4), images/, identity/, labels/malignancy/, "
        "and truth/ for oracles alone; with --icu: hourly ICU stays, labels of death, no images. Whole or not at all; the bytes "
        "never depend on --workers.",
        epilog="example, two hospitals of different people: python -m synthetic generate --patients 2000 --out inside; "
        "python -m synthetic generate --site external --patients 600 --first 100000 --out outside",
    )
    verb.add_argument(
        "--icu", action="store_true", help="ICU stays instead of CT and visits; --knob turns the ICU law's knobs"
    )
    verb.add_argument("--patients", type=int, default=2000, metavar="N", help="subjects, or ICU stays (default 2000)")
    first = "number of the first one (default 0). A number at two sites is one person twice: give cohorts to be compared their own"
    verb.add_argument("--first", type=int, default=0, metavar="N", help=first)
    verb.add_argument("--format", dest="image_format", metavar="F", help="of images: nifti (default), dicom")
    verb.add_argument("--size", type=int, metavar="V", help="voxels a side: 32 (default), 48 or 64")
    scans = "CTs a subject, 1 (default) to 3, at about 0, 90 and 365 days; the label stands at the last"
    verb.add_argument("--scans", type=int, metavar="C", help=scans)
    leak = "plant a fault that an audit is due to find (docs/synthetic.md lists them); may be given several times"
    verb.add_argument("--leak", action="append", metavar="NAME", help=leak)
    _add_site(verb)
    _add_seed(verb)
    verb.add_argument(
        "--out", required=True, type=_new_path, metavar="X", help="folder to write; must not hold anything yet"
    )
    _add_workers(verb)
    return verb


def _add_oracle(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "oracle",
        help="print the AUC of the exact Bayes scores, inside and outside",
        description="AUC of the exact scores on fresh subjects, over seeds: env_bayes knows the site, source_bayes the internal "
        "site only, c_blind holds that the care pathway says nothing of the label, causal_z knows the causes; ceiling_<n> is "
        "tuned ridge on the sufficient statistic from n labels. With --icu: what ICU stays are like, the exact observer's risk "
        "of death, forecast errors, with 95 % intervals.",
    )
    verb.add_argument("--icu", action="store_true", help="the ICU world instead")
    verb.add_argument(
        "--patients", type=int, metavar="N", help="subjects a site and seed (default 4000; --icu: 20000 stays)"
    )
    verb.add_argument("--particles", type=int, metavar="P", help="a stay, with --icu (default 256)")
    _add_seeds(verb)
    _add_workers(verb)
    return verb


def _add_shift(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "shift",
        help="print which arm wins under which shift, knob by knob, beside the oracles",
        description="Level 0: closed-form arms (image, EHR, fusion weak and tuned, JEPA as CCA, PCA) by knob, fault of the "
        "training data and structure of the world. Level 2: the exact ICU observer by knob, knowing the site and not.",
    )
    verb.add_argument("--level", type=int, choices=(0, 2), default=0, help="0: features (default); 2: ICU stays")
    verb.add_argument(
        "--patients", type=int, metavar="N", help="test subjects a site and seed (default 4000; level 2: stays)"
    )
    _add_seeds(verb)
    _add_workers(verb)
    return verb


def _add_look(verbs: Any) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        "look",
        help="draw a contact sheet: patches, repeated scans, event timelines, ICU stays",
        description="Draw a contact sheet of the first subjects of a site, for a person to look at.",
    )
    verb.add_argument(
        "--out", type=_new_path, default=Path("world.png"), metavar="X", help="png, pdf or svg (default world.png)"
    )
    _add_site(verb)
    _add_seed(verb)
    return verb


def _add_site(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--site",
        action="append",
        metavar="NAME",
        help="internal (default) or external (other label-pathway link and case mix); several for a cohort of several sites; "
        "a new name needs a --knob",
    )
    verb.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="[SITE.]K=V",
        help="turn a knob of every site, or of one: --knob spec=1.4 --knob east.rho=0",
    )


def _add_seed(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="the world and its subjects (default 0)")


def _add_seeds(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--seeds", type=int, metavar="K", help="seeds 0 .. K-1 (default 8; not for ICU stays)")


def _add_workers(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--workers", type=int, default=1, metavar="W", help=f"processes (default 1; this machine: {os.cpu_count()})"
    )


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from synthetic.presets import find_sites, turned

    asked = {name: getattr(args, name) for name in _IMAGE_OPTIONS if getattr(args, name) is not None}
    common = {"patients": args.patients, "first": args.first, "seed": args.seed, "workers": args.workers}
    if args.icu:
        from synthetic.icu import Icu
        from synthetic.icu_source import generate as generate_stays

        _refuse(args, _IMAGE_OPTIONS, "with --icu")
        site = _only(find_sites(args.preset, args.site or ["internal"], []))
        result = generate_stays(args.out, site=site, law=turned(Icu(), args.knob), **common)
        say(f"{result['out']}: {result['patients']} stays, {result['deaths']} deaths, {result['ehr_rows']} record rows")
    else:
        from synthetic import generate

        sites = find_sites(args.preset, args.site or ["internal"], args.knob)
        result = generate(args.out, site=sites, preset=args.preset, **common, **asked)
        rows = f"{result['positives']} with cancer, {result['ehr_rows']} record rows, {result['images']} images"
        say(f"{result['out']}: {result['patients']} patients, {rows}")
    say(f"Next: mmjepa ingest {shlex.quote(result['out'])} --out COHORT")
    return result


def _refuse(args: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """Refuse options that would do nothing."""
    for name in names:
        if getattr(args, name) is not None:
            raise Refusal("SYNTHETIC_RANGE", f"--{_SPELT.get(name, name)} does nothing {where}", "Leave it out")


def _only(sites: list[Any]) -> Any:
    if len(sites) > 1:
        raise Refusal("SYNTHETIC_RANGE", "ICU stays are written one site at a time", "Name one --site")
    return sites[0]


def _oracle(args: argparse.Namespace) -> dict[str, Any]:
    if args.icu:
        from synthetic.icu_oracle import LEGEND, icu_table

        _refuse(args, ("seeds",), "with --icu")
        stays = _given(args.patients, 20_000)
        particles = _given(args.particles, 256)
        result = icu_table(stays, stays, particles, seed=0)
        _print(args, [*_icu_lines(result), "", LEGEND])
        return {"icu": True, "stays": stays, "particles": particles, "seed": 0} | result
    from synthetic import oracle

    _refuse(args, ("particles",), "without --icu")
    result = oracle.run(args.preset, _given(args.seeds, 8), _given(args.patients, 4000), args.workers)
    _print(args, _oracle_lines(result))
    return result


def _shift(args: argparse.Namespace) -> dict[str, Any]:
    if args.level == 2:
        from synthetic.icu_oracle import icu_shift_table

        _refuse(args, ("seeds",), "at level 2")
        stays = _given(args.patients, 4000)
        result = icu_shift_table(stays, 256, seed=0)
        _print(args, _knob_lines(result))
        return {"level": 2, "stays": stays, "seed": 0, "knobs": result}
    from synthetic import shift

    result = shift.run(args.preset, _given(args.seeds, 8), _given(args.patients, 4000), args.workers)
    _print(args, shift.lines(result))
    return result


def _look(args: argparse.Namespace) -> dict[str, Any]:
    from synthetic import look, plan
    from synthetic.presets import find_sites

    sites = find_sites(args.preset, args.site or ["internal"], args.knob)
    made = plan.checked(0, look.PATCHES, sites, args.preset, args.seed, "nifti", 1, 32, 3, [])
    result = look.contact_sheet(args.out, made)
    say(f"the contact sheet: {result['out']}")
    return result


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _print(args: argparse.Namespace, lines: Iterator[str] | list[str]) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)


def _oracle_lines(result: Mapping[str, Any]) -> Iterator[str]:
    sites = result["sites"]
    yield f"{'AUC, mean (sd) over seeds':<26}" + "".join(f"{site:>16}" for site in sites)
    for name in next(iter(sites.values())):
        found = [site[name] for site in sites.values()]
        cells = (f"{f['mean']:.3f}" + ("" if f["sd"] is None else f" ({f['sd']:.3f})") for f in found)
        yield f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells)


def _icu_lines(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    for part, table in result.items():
        yield part
        for name, number in table.items():
            if isinstance(number, Mapping):
                yield f"  {name:<24}{number['value']:8.3f}  ({number['low']:.3f} to {number['high']:.3f})"
            else:
                yield f"  {name:<24}{number:8.3f}"


def _knob_lines(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    names = list(next(iter(result.values())))
    yield "death rate; mean risk and AUC of the exact observer for death in hours 13-24 and 25-47: env knows the site's law, source the"
    yield "internal one"
    yield f"{'knob':<24}" + "".join(f"{name:>20}" for name in names)
    for knob, row in result.items():
        yield f"{knob:<24}" + "".join(f"{row[name]['value']:>20.3f}" for name in names)


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 refused, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        result = {"generate": _generate, "oracle": _oracle, "shift": _shift, "look": _look}[args.verb](args)
        if args.json:
            print(json.dumps(result), flush=True)
    except Refusal as refusal:
        say(f"refused: {refusal}")
        return 2
    except OSError as error:
        say(f"refused: FILE_ACCESS: {error.filename or args.verb}: {error.strerror or type(error).__name__}")
        return 2
    except (BrokenExecutor, MemoryError):
        say("refused: OUT_OF_MEMORY: a process found no memory or was killed. Ask for fewer --workers")
        return 2
    except KeyboardInterrupt:
        say("interrupted; nothing was left behind")
        return 130
    return 0
