"""NIfTI files and their table."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mmjepa.keyed import generator

from .base import CASES, DEPTH, OPTIONS, SIZE, Build, Slices, case, save


def nifti(edit: Callable[[nib.Nifti1Image], object] = lambda image: None, name: str = "n.nii", **change: Any) -> Build:
    """A case of one NIfTI file and its table. change: values (a function of the HU array), affine, table=False, or rescale
    (slope and intercept as the table has them)."""

    def build(folder: Path, slices: Slices) -> None:
        hu = generator(0, "malformed/nifti").integers(-1000, 400, (*SIZE, DEPTH)).astype(np.int16)
        affine = change.get("affine", np.array([[-0.8, 0, 0, 20], [0, 0.7, 0, -31], [0, 0, 2, -100], [0, 0, 0, 1.0]]))
        image = nib.Nifti1Image(change.get("values", lambda hu: hu)(hu), affine)
        image.header.set_xyzt_units("mm")
        edit(image)
        nib.save(image, folder / name)
        if change.get("table", True):
            head, more = (",slope,intercept", f",{change['rescale']}") if "rescale" in change else ("", "")
            row = f"{name},P9,2020-03-01T10:15:00{more}"
            (folder / "images.csv").write_text(f"file,patient_id,time{head}\n{row}\n", encoding="utf-8")

    return build


def _codes(sform: int, qform: int) -> Callable[[nib.Nifti1Image], object]:
    return lambda image: (image.set_qform(image.affine, qform), image.set_sform(image.affine, sform))


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hu: np.where(np.arange(hu.size).reshape(hu.shape) == 77, np.float32(value), hu).astype(np.float32)


def _raw_padded(hu: np.ndarray) -> np.ndarray:
    raw = hu + 1024
    raw[:6] = -2000
    return raw


def _cut(build: Build, name: str, keep: float) -> Build:
    def cut(folder: Path, slices: Slices) -> None:
        build(folder, slices)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return cut


def _headed(offset: int, field: bytes) -> Build:
    """A case with bytes of the NIfTI header replaced."""

    def build(folder: Path, slices: Slices) -> None:
        nifti()(folder, slices)
        content = bytearray((folder / "n.nii").read_bytes())
        content[offset : offset + len(field)] = field
        (folder / "n.nii").write_bytes(content)

    return build


_DIM, _SROW = 40, 280
CASES["nifti_clean"] = nifti()
CASES["nifti_gzip"] = nifti(name="n.nii.gz")
CASES["nifti_qform_only"] = nifti(_codes(0, 1))
CASES["nifti_scaled"] = nifti(values=lambda hu: hu + 1024, edit=lambda image: image.header.set_slope_inter(1, -1024))
CASES["nifti_nan"] = nifti(values=_with(np.nan))
CASES["nifti_infinite"] = nifti(values=_with(np.inf))
CASES["nifti_no_affine"] = nifti(_codes(0, 0))
CASES["nifti_zero_affine"] = _headed(_SROW, bytes(48))
CASES["nifti_tiny_spacing"] = nifti(affine=np.diag([0.8, 0.8, 1e-9, 1]))
CASES["nifti_sheared"] = nifti(affine=np.array([[0.8, 0, 0, 0], [0, 0.8, 0.6, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]]))
CASES["nifti_sheared_within_slices"] = nifti(
    affine=np.array([[0.8, 0.3, 0, 0], [0, 0.8, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
)
CASES["nifti_nan_affine"] = _headed(_SROW, np.array([np.nan, 0, 0, 0], "<f4").tobytes())
CASES["nifti_4d_of_one"] = nifti(values=lambda hu: hu[..., None])
CASES["nifti_4d"] = nifti(values=lambda hu: np.stack([hu, hu], axis=-1))
CASES["nifti_2d"] = nifti(values=lambda hu: hu[:, :, 0])
CASES["nifti_one_slice"] = nifti(values=lambda hu: hu[:, :, :1])
CASES["nifti_constant"] = nifti(values=lambda hu: np.full_like(hu, -900))
CASES["nifti_raw"] = nifti(values=lambda hu: hu + 1024)
CASES["nifti_raw_with_padding"] = nifti(values=_raw_padded)
CASES["nifti_voxels_swapped"] = nifti(values=lambda hu: hu.byteswap())
CASES["nifti_rescale_in_table"] = nifti(values=lambda hu: hu + 1024, rescale="1,-1024")
CASES["nifti_large_intercept_in_table"] = nifti(values=lambda hu: hu + 8192, rescale="1.0,-8192.0")
CASES["nifti_rescale_empty"] = nifti(values=lambda hu: hu + 1024, rescale="1,")
CASES["nifti_rescale_not_finite"] = nifti(values=lambda hu: hu + 1024, rescale="nan,-1024")
CASES["nifti_rescaled_twice"] = nifti(rescale="1,-1024")
CASES["nifti_scaled_and_rescaled"] = nifti(
    values=lambda hu: hu + 1024, edit=lambda image: image.header.set_slope_inter(1, -1024), rescale="1,-1024"
)
OPTIONS |= {name: {"nifti_hu": "csv"} for name in CASES if name.startswith("nifti_") and "rescale" in name}
OPTIONS["nifti_large_intercept_in_table"] = {"nifti_hu": "csv"}
CASES["nifti_name_not_ascii"] = nifti(name="n Größe 胸部.nii")
CASES["nifti_cut"] = _cut(nifti(), "n.nii", 0.6)
CASES["nifti_gzip_cut"] = _cut(nifti(name="n.nii.gz"), "n.nii.gz", 0.6)
CASES["nifti_bomb"] = _headed(_DIM, np.array([3, 32767, 32767, 32767], "<i2").tobytes())
CASES["nifti_too_short"] = _headed(_DIM, np.array([3, 512, 512, 512], "<i2").tobytes())
CASES["nifti_without_table"] = nifti(table=False)
CASES["text_named_nifti"] = _headed(0, b"this is text " * 200)


@case
def nifti_big_endian(folder: Path, slices: Slices) -> None:
    nifti()(folder, slices)
    image = nib.Nifti1Image.from_bytes((folder / "n.nii").read_bytes())
    swapped = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header.as_byteswapped(">"))
    nib.save(swapped, folder / "n.nii")


@case
def nifti_beside_dicom(folder: Path, slices: Slices) -> None:
    save(folder / "scan", slices)
    nifti()(folder, slices)


@case
def nifti_gzip_bomb(folder: Path, slices: Slices) -> None:
    nifti(name="n.nii.gz")(folder, slices)
    path = folder / "n.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(256 << 20), 1))
