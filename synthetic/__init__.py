"""A synthetic paired CT + EHR world whose truth is known; ``python -m synthetic --help``.

It knows nothing of the models: nothing here imports more of mmjepa than its refusals, files and progress bars.
"""

from pathlib import Path
from typing import Any


def generate(
    out: Path | str,
    *,
    patients: int,
    site: str = "internal",
    preset: str = "li2025",
    seed: int = 0,
    image_format: str = "nifti",
    workers: int = 1,
) -> dict[str, Any]:
    """Write a source folder to ``out`` and return its summary; see ``synthetic.source.generate``."""
    from synthetic import source

    return source.generate(
        Path(out), patients=patients, site=site, preset=preset, seed=seed, image_format=image_format, workers=workers
    )
