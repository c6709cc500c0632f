"""Malformed and odd CT inputs, as functions that fill a folder. What must become of each stands in ``ct_malformed.csv``.

The first twenty (``TABLE``) are edits of any chest series; the others start from a synthetic one. A file's name says what it is for:
``a*.dcm``, ``b*.dcm`` are the slices that volume a, b must hold where it is accepted, ``n*.nii`` likewise; all else is in the way.
"""

from . import folders, headers, hidden, nifti, voxels
from .base import CASES, OPTIONS, real_series, stored, synthetic_series
from .table import TABLE

__all__ = [
    "CASES",
    "OPTIONS",
    "TABLE",
    "folders",
    "headers",
    "hidden",
    "nifti",
    "real_series",
    "stored",
    "synthetic_series",
    "voxels",
]
