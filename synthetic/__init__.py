"""A synthetic paired CT + EHR world whose truth is known; ``python -m synthetic --help``.

It knows nothing of the models: nothing here imports more of mmjepa than its refusals, files and progress bars.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthetic.presets import Site


def generate(
    out: Path | str,
    *,
    patients: int,
    first: int = 0,
    site: "str | Site | Sequence[str | Site]" = "internal",
    preset: str = "li2025",
    seed: int = 0,
    image_format: str = "nifti",
    workers: int = 1,
    size: int = 32,
    scans: int = 1,
    leak: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a source folder of subjects ``first`` .. ``first + patients - 1`` to ``out`` and return its summary.

    A subject at two sites is one person under two laws: cohorts to be compared need numbers of their own. site: one or several, by name or made with ``synthetic.presets.turned``; subjects are dealt to them evenly. preset: the
    world's constants. image_format: ``nifti`` or ``dicom``. size: 32, 48 or 64 voxels. scans: 1 to 3 CTs a subject.
    leak: names of ``synthetic.leaks.SWITCHES``. The bytes written do not depend on ``workers``.

    Folders of one preset and seed show the same people in the same order, under other laws and other ids: a model that learnt from
    them at one site knows their labels at another. A split holds the same people everywhere: judge elsewhere on ``held_out``.
    Raises Refusal: ``SYNTHETIC_UNKNOWN`` (names), ``SYNTHETIC_RANGE`` (numbers), ``OUTPUT_EXISTS``, ``DISK_FULL``.
    """
    from synthetic import plan, source

    wanted = plan.checked(first, patients, site, preset, seed, image_format, workers, size, scans, leak)
    return source.generate(Path(out), wanted, patients, workers, first)
