"""What the EHR path costs, and that it is exact: one JSON line a figure; ``met`` says whether its goal is held.

Each part is a module of ``ehr_parts`` with a function ``run(options)`` that yields lines; its docstring says what is measured
and how. ``--only batches,build`` runs some. CPU times are of one thread. What is generated lies in a temporary folder.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib
import json
import pkgutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import ehr_parts
from ehr_parts.common import Options


def parts() -> dict[str, ModuleType]:
    """Name -> module of every part."""
    names = [module.name for module in pkgutil.iter_modules(ehr_parts.__path__) if not module.ispkg]
    found = {name: importlib.import_module(f"ehr_parts.{name}") for name in names}
    return {name: module for name, module in found.items() if hasattr(module, "run")}


def main(arguments: list[str] | None = None) -> int:
    known = parts()
    listed = "\n".join(f"  {name:10} {(module.__doc__ or '').splitlines()[0]}" for name, module in known.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = os.environ.get("MMJEPA_DATA")
    parser.add_argument("--only", default=",".join(known), help="parts to run, with commas between")
    parser.add_argument(
        "--peer-env", type=Path, default=Path.home() / ".cache" / "mmjepa-peers", help="folder of peers"
    )
    parser.add_argument("--mimic", type=Path, default=Path(data) / "mimic_iv_demo_meds" if data else None)
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--small", action="store_true", help="tiny sizes: that the path works, nothing of its speed")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.only.split(",")) - set(known)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    mimic = chosen.mimic if chosen.mimic is not None and chosen.mimic.is_dir() else None
    for name in chosen.only.split(","):
        with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
            for line in known[name].run(Options(Path(scratch), chosen.peer_env, mimic, chosen.small)):
                print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
