"""Is this installation able to work? One line a part, with what to do."""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["OK", "missing", "broken"]
MIN_FREE_GB = 2.0
DICOM_DECODERS = {
    "gdcm": "python-gdcm",
    "openjpeg": "pylibjpeg-openjpeg",
    "jpeg_ls": "pyjpegls",
    "highdicom": "highdicom",
}
INSTALL = "install again with the constraints: pip install -c constraints.txt -e '.[dev]'"


def doctor() -> dict[str, Any]:
    """Check Python, packages, threads, devices, decoders, disk.

    Returns verdict (``OK``; ``broken`` when a part of the core does not work; ``limited`` when another part is broken: the core
    works), broken (the names of those parts) and parts, each with part, state, found, advice, core.
    """
    parts = [
        _python(),
        *_packages(),
        *_torch(),
        *_decoders(),
        _torchvision(),
        _timm(),
        _hugging_face_datasets(),
        _disk(),
    ]
    core = any(part["core"] and part["state"] != "OK" for part in parts)
    broken = [part["part"] for part in parts if part["state"] == "broken" or (part["core"] and part["state"] != "OK")]
    return {"verdict": "broken" if core else "limited" if broken else "OK", "broken": broken, "parts": parts}


def _part(part: str, state: State, found: str, advice: str = "", *, core: bool = False) -> dict[str, Any]:
    return {"part": part, "state": state, "found": found, "advice": "" if state == "OK" else advice, "core": core}


def _python() -> dict[str, Any]:
    state: State = "OK" if sys.version_info >= (3, 11) else "broken"
    return _part("python", state, platform.python_version(), "mmjepa needs 3.11 or newer", core=True)


def _packages() -> list[dict[str, Any]]:
    """Every package of the core against its range in this package's own metadata."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("mmjepa") or []]
    except metadata.PackageNotFoundError:
        return [_part("mmjepa", "missing", "not installed, only on the path", "pip install -c constraints.txt -e .")]
    return [_package(need.name, str(need.specifier)) for need in wanted if need.marker is None]


def _package(name: str, wanted: str) -> dict[str, Any]:
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _part(name, "missing", f"not installed, want {wanted}", INSTALL, core=True)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return _part(name, "broken", f"{version}, want {wanted}", INSTALL, core=True)
    return _part(name, "OK", version, core=True)


def _torch() -> list[dict[str, Any]]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return [_part("torch import", "broken", _line(error), INSTALL, core=True)]
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    waits = "passive" if passive else "spinning: on a busy machine set OMP_WAIT_POLICY=passive or OMP_NUM_THREADS=1"
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
        device = _part("cuda", "OK", f"{torch.cuda.device_count()} device(s), {name}, {memory:.0f} GiB")
    else:
        device = _part("cuda", "missing", "no CUDA device", "the CPU is used; enough for the demo and the tests")
    return [
        _part("torch import", "OK", f"{torch.__version__}", core=True),
        _part("threads", "OK", f"{threads} of {cores} cores, waiting threads are {waits if threads > 1 else 'none'}"),
        device,
        _bf16(torch),
    ]


def _bf16(torch: Any) -> dict[str, Any]:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = [name for name in checks if getattr(torch.cpu, name, lambda: False)()]
    if fast:
        return _part("bf16 on the CPU", "OK", "supported by the processor")
    return _part("bf16 on the CPU", "missing", "not accelerated by this processor", "stay with fp32 on the CPU")


def _decoders() -> list[dict[str, Any]]:
    """The optional decoders of compressed DICOM."""
    return [
        _part(f"DICOM: {package}", *_state_of(module), "pip install -c constraints.txt -e '.[dicom]'")
        for module, package in DICOM_DECODERS.items()
    ]


def _state_of(module: str) -> tuple[State, str]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return ("missing", "not installed") if error.name == module else ("broken", _line(error))
    except (ImportError, OSError, RuntimeError) as error:
        return "broken", _line(error)
    return "OK", "imports"


def _torchvision() -> dict[str, Any]:
    """Absent is right: only timm needs it, and one built for another torch breaks what imports it."""
    state, found = _state_of("torchvision")
    if state == "missing":
        return _part("torchvision", "OK", "not installed; only the timm extra needs it")
    if "torchvision::" in found:
        found = "this torchvision does not match this torch"
    return _part("torchvision", state, found, "pip uninstall torchvision, or install the build that matches torch")


def _timm() -> dict[str, Any]:
    state, found = _state_of("timm")
    if "torchvision::" in found:
        return _part("timm", "broken", "this torchvision does not match this torch", "see torchvision")
    return _part("timm", state, found, "for the 2.5-D slice encoder only: pip install -c constraints.txt -e '.[timm]'")


def _hugging_face_datasets() -> dict[str, Any]:
    """A folder named ``datasets`` on the path passes for Hugging Face's package; ``find_spec`` alone does not import it."""
    try:
        spec = importlib.util.find_spec("datasets")
    except ValueError:
        spec = None
    if spec is None:
        return _part("datasets", "OK", "no package of that name")
    if spec.origin is None:
        advice = "a folder passes for the package `datasets`: start without -m, or with PYTHONSAFEPATH=1"
        return _part("datasets", "broken", "shadowed by a folder", advice)
    return _part("datasets", "OK", "the installed package")


def _disk() -> dict[str, Any]:
    """Can this folder be written, and is there room."""
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        return _part("disk", "broken", f"this folder cannot be written ({error.strerror})", "start where you may write")
    state: State = "OK" if free_gb >= MIN_FREE_GB else "broken"
    return _part("disk", state, f"{free_gb:.1f} GB free", f"free some space; want {MIN_FREE_GB:.0f} GB")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
