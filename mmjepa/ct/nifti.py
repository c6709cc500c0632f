"""NIfTI files. They name neither person nor date: ``images.csv`` beside them does (columns file, patient_id, time).

Nor do they say whether voxels are HU or a scanner's raw values. ``nifti_hu`` decides: ``auto`` takes them as HU where they look like HU,
``as-is`` takes them so whatever they look like, ``csv`` makes HU of them by the columns slope and intercept of ``images.csv``, where
the result looks like HU (values that were HU already do not, after that). What looks like HU has air or lung, and soft tissue.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from mmjepa.ct.resample import straighten_hu
from mmjepa.ct.volume import (
    HU_FLOOR,
    SPACING_MM,
    Candidate,
    Settings,
    Volume,
    canonical,
    check_hu,
    relative,
    shear_degrees,
    spacing_mm,
    to_hu,
)
from mmjepa.identity import Crosswalk, read_rows
from mmjepa.refusal import Refusal

_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 540  # of NIfTI-2, the longer one
_HEAD_BYTES = 4096  # these hold them, in gzip too
_MOST_ZIPPED = 1100  # gzip makes nothing smaller than a 1032nd
_SLACK_BYTES = 1 << 20  # some writers pad the end
TABLE = "images.csv"
COLUMNS = ("file", "patient_id", "time")
RESCALE_COLUMNS = ("slope", "intercept")
_AIR_HU, _TISSUE_HU = (HU_FLOOR, -200), (-200, 300)  # below the floor is padding, which raw values have too
_LEAST_SHARE = 0.02  # of each; a chest has over 30 %, one that is off by 1024 HU under 0.2 % of one of them
_MOST_FLOOR = 0.25  # at or below the floor; more than the corners around a round field of view means air below air


class File(NamedTuple):
    """One NIfTI file, and (slope, intercept) where its table must make HU of its voxels."""

    path: Path
    rescale: tuple[float, float] | None


def looks_like_nifti(path: Path, head: bytes) -> bool:
    """By content (also inside gzip), or by a name that claims it."""
    if path.name.endswith((".nii", ".nii.gz")):
        return True
    if head[:2] == _GZIP:
        try:
            head = zlib.decompressobj(31).decompress(head, 352)
        except zlib.error:
            return False
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def candidates(
    files: Sequence[Path], source: Path, table: Path | None, crosswalk: Crosswalk, settings: Settings
) -> list[Candidate]:
    """One candidate for each NIfTI file and for each row of ``table`` whose file is absent. Raises Refusal IMAGES_CSV_*."""
    rows = _read_table(table, COLUMNS + RESCALE_COLUMNS * (settings.nifti_hu == "csv")) if table else {}
    no_row = _no_row(table)
    found = [_judge(path, rows.pop(path.resolve(), None), no_row, source, crosswalk, settings) for path in files]
    for path, (number, _) in rows.items():
        refusal = Refusal(
            "NII_FILE_MISSING",
            f"{TABLE} row {number}: no such NIfTI file in the source folder",
            "Correct the row's file, relative to the folder of the table, or leave the row out",
        )
        found.append(Candidate(crosswalk.image_id(_name(path, source.resolve())), "nifti", refusal=refusal))
    return found


def _no_row(table: Path | None) -> Refusal:
    columns = ",".join(COLUMNS)
    if table is None:
        return Refusal("CT_SUBJECT_MISSING", f"{TABLE} is absent", f"Write one beside the files: {columns}")
    return Refusal(
        "CT_SUBJECT_MISSING", f"{TABLE} names no patient for this file", f"Add a row for it to {TABLE}: {columns}"
    )


def _name(path: Path, source: Path) -> str:
    """What image_id is made of. A row may name a file outside the source."""
    return relative(path, source) if path.is_relative_to(source) else relative(path, Path(path.anchor))


def patients(table: Path) -> set[str]:
    """The patient ids that ``images.csv`` names."""
    return {values["patient_id"] for _, values in _read_table(table, COLUMNS).values()} - {""}


def _read_table(table: Path, columns: tuple[str, ...]) -> dict[Path, tuple[int, dict[str, str]]]:
    rows: dict[Path, tuple[int, dict[str, str]]] = {}
    for number, values in read_rows(table, columns, "IMAGES_CSV", TABLE):
        try:
            path = (table.parent / values["file"]).resolve()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
            raise Refusal("IMAGES_CSV_VALUE", f"{TABLE} row {number}: file is not a path") from None
        if path in rows:
            raise Refusal("IMAGES_CSV_DUPLICATE", f"{TABLE} rows {rows[path][0]} and {number} name the same file")
        rows[path] = (number, values)
    return rows


def _judge(
    path: Path,
    row: tuple[int, dict[str, str]] | None,
    no_row: Refusal,
    source: Path,
    crosswalk: Crosswalk,
    settings: Settings,
) -> Candidate:
    image_id = crosswalk.image_id(relative(path, source))
    try:
        if row is None or not row[1]["patient_id"]:
            raise no_row
        number, values = row
        patient = values["patient_id"]
        subject = crosswalk.subject_id(patient)
        if subject is None:
            raise Refusal("CT_SUBJECT_UNKNOWN", "the patient is not in the crosswalk", "Add a row for this patient")
        moment = _moment(values["time"], number, crosswalk.date_shift_days(patient))
        rescale = _rescale(values, number) if settings.nifti_hu == "csv" else None
    except Refusal as refusal:
        return Candidate(image_id, "nifti", refusal=refusal)
    flags = [] if moment else ["CT_NO_TIME"]
    if settings.tilt == "resample" and _is_tilted(path):
        flags.append("CT_GANTRY_TILT")
    return Candidate(image_id, "nifti", (File(path, rescale),), subject, moment, flags=tuple(flags))


def _rescale(values: dict[str, str], number: int) -> tuple[float, float]:
    try:
        slope, intercept = (float(values[name]) for name in RESCALE_COLUMNS)
    except ValueError:
        slope = intercept = math.nan
    if not (slope > 0 and math.isfinite(slope) and math.isfinite(intercept)):
        raise Refusal(
            "NII_HU_UNKNOWN",
            f"{TABLE} row {number}: slope and intercept are not finite numbers, slope above 0",
            "Take them from the metadata of the source",
        )
    return slope, intercept


def _is_tilted(path: Path) -> bool:
    """Whether the header's axes are not at right angles. What cannot be read is refused with its voxels."""
    try:
        with open(path, "rb") as handle, np.errstate(all="ignore"):
            _, header = _header(handle.read(_HEAD_BYTES))
            return shear_degrees(np.asarray(header.get_best_affine(), dtype=float)) > 0
    except Exception:  # gzip, zlib and nibabel each fail in their own way on broken bytes
        return False


def _moment(text: str, number: int, shift_days: int) -> datetime | None:
    """The time of a row, shifted; None where it is empty."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo or len(text) <= len("2000-01-01"):
            raise ValueError
        return moment + timedelta(days=shift_days)
    except (ValueError, OverflowError):  # the latter: shifted out of the calendar
        raise Refusal(
            "NII_TIME",
            f"{TABLE} row {number}: time is not an ISO date and time of the site's clock",
            "Write it like 2000-12-31T23:59:59, or leave it empty",
        ) from None


def source_hash(part: File) -> str:
    """Hash of the file, and of what its table says about its voxels."""
    return _digest(part.path.read_bytes(), part.rescale)


def _digest(content: bytes, rescale: tuple[float, float] | None) -> str:
    digest = hashlib.sha256(content)
    if rescale:
        digest.update(f"slope {rescale[0]!r} intercept {rescale[1]!r}".encode())
    return digest.hexdigest()


def read_volume(found: Candidate, settings: Settings) -> Volume:
    """Read and check one file. Raises Refusal NII_* and the CT codes of voxels (CT_TOO_FEW_SLICES, CT_CONSTANT, ...)."""
    part: File = found.parts[0]
    try:
        content = part.path.read_bytes()
        image = _open(content, settings)
        affine = _affine(image, settings)
        _check_shape(image, settings)
        values = _rescaled(image, part.rescale)
    except (Refusal, MemoryError):
        raise
    except Exception:  # gzip, zlib, nibabel and numpy each fail in their own way on broken bytes
        raise Refusal("NII_UNREADABLE", "not NIfTI, or truncated") from None
    _check_values(values, settings)
    hu = to_hu(values)
    hu_range = check_hu(hu, None)
    if shear_degrees(affine):
        hu, affine = straighten_hu(hu, affine)
        hu_range = int(hu.min()), int(hu.max())
    return Volume(*canonical(hu, affine), hu_range, _digest(content, part.rescale))


def _open(content: bytes, settings: Settings) -> nib.Nifti1Image:
    """The image in memory. What its header announces must be possible before any memory is taken for it."""
    zipped = content[:2] == _GZIP
    image_class, header = _header(content)
    settings.check_size(header.get_data_shape())
    voxels = math.prod(header.get_data_shape())
    announced = int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize
    if announced > len(content) * (_MOST_ZIPPED if zipped else 1):
        raise Refusal("NII_UNREADABLE", "not NIfTI, or truncated")
    return image_class.from_bytes(_unzipped(content, announced + _SLACK_BYTES) if zipped else content)


def _header(content: bytes) -> tuple[type[nib.Nifti1Image], nib.Nifti1Header]:
    """The header at the beginning of a file, and the class of its image. Raises whatever broken bytes lead to."""
    zipped = content[:2] == _GZIP
    head = zlib.decompressobj(31).decompress(content, _HEADER_BYTES) if zipped else content[:_HEADER_BYTES]
    image_class = nib.Nifti2Image if head[4:7] == b"n+2" else nib.Nifti1Image
    return image_class, image_class.header_class(head[: image_class.header_class.sizeof_hdr])


def _unzipped(content: bytes, most: int) -> bytes:
    """What is inside gzip, unless it is more than ``most`` bytes: a small file may unpack to any size."""
    with gzip.GzipFile(fileobj=BytesIO(content)) as handle:
        unzipped = handle.read(most)
        if handle.read(1):
            raise Refusal("NII_UNREADABLE", "holds more than its header announces")
    return unzipped


def _check_shape(image: nib.Nifti1Image, settings: Settings) -> None:
    shape = image.shape
    if len(shape) != 3:
        raise Refusal("NII_NOT_3D", f"shape {shape}", "Want one volume of three axes")
    if min(shape) < settings.min_slices:
        raise Refusal(
            "CT_TOO_FEW_SLICES",
            f"{min(shape)} slices, want >= {settings.min_slices}",
            "Set min_slices (--min-slices) lower if so few are a volume to you",
        )
    if image.get_data_dtype().kind not in "iuf":
        raise Refusal("NII_UNREADABLE", "voxels are not real numbers")


def _affine(image: nib.Nifti1Image, settings: Settings) -> np.ndarray:
    header = image.header
    if not header["sform_code"] and not header["qform_code"]:
        raise Refusal("NII_NO_AFFINE", "sform and qform codes are 0", "Write the affine into the file")
    affine = np.asarray(image.affine, dtype=float)
    spacing = spacing_mm(affine)
    units = header.get_xyzt_units()[0]
    low, high = SPACING_MM
    if not np.isfinite(affine).all() or not all(low <= s <= high for s in spacing) or units not in ("mm", "unknown"):
        shown = " x ".join(f"{s:.3g}" for s in spacing)
        raise Refusal("NII_BAD_SPACING", f"spacing {shown} in {units}", f"Want mm, each between {low} and {high}")
    degrees = shear_degrees(affine)
    if shear_degrees(affine, axes=2):
        raise Refusal("CT_ORIENTATION_INVALID", f"axes within a slice are {degrees:.1f} degrees off a right angle")
    if degrees and settings.tilt == "refuse":
        raise Refusal(
            "CT_GANTRY_TILT",
            f"tilt {degrees:.1f} degrees",
            "Straighten such volumes with tilt=resample (--tilt resample)",
        )
    return affine


def _rescaled(image: nib.Nifti1Image, rescale: tuple[float, float] | None) -> np.ndarray:
    """Voxels as float32; HU where ``rescale`` is given. Raises NII_HU_UNKNOWN for a file with a scale of its own besides."""
    proxy: Any = image.dataobj  # it keeps the scale; the header of a loaded image does not
    values = np.asarray(proxy).astype(np.float32)
    if rescale is None:
        return values
    if (proxy.slope, proxy.inter) != (1, 0):
        raise Refusal(
            "NII_HU_UNKNOWN",
            f"the file has a scale of its own and {TABLE} another",
            "Set nifti_hu=as-is (--nifti-hu as-is) if the file's gives HU",
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number then is refused
        values *= rescale[0]
        values += rescale[1]
    return values


def _check_values(values: np.ndarray, settings: Settings) -> None:
    """Refuse what is not finite (NII_NONFINITE), constant (CT_CONSTANT) or, unless taken as it is, does not look like HU."""
    broken = values.size - int(np.isfinite(values).sum())
    if broken:
        raise Refusal("NII_NONFINITE", f"{broken} NaN or infinite voxels")
    if values.min() == values.max():
        raise Refusal("CT_CONSTANT", f"all voxels equal {values.min():g}")
    air, tissue = (float(((values >= low) & (values <= high)).mean()) for low, high in (_AIR_HU, _TISSUE_HU))
    low = float((values <= HU_FLOOR).mean())  # a crop of lung alone has next to no soft tissue, and nothing down there
    if settings.nifti_hu == "as-is" or (air >= _LEAST_SHARE and (tissue >= _LEAST_SHARE or low <= _MOST_FLOOR)):
        return
    found = (
        f"{air:.1%} of the voxels are like air or lung, {tissue:.1%} like soft tissue, want {_LEAST_SHARE:.0%} of each"
    )
    if settings.nifti_hu == "csv":
        raise Refusal("CT_HU_IMPLAUSIBLE", found, "Were they HU before? Then set nifti_hu=as-is (--nifti-hu as-is)")
    raise Refusal(
        "NII_HU_UNKNOWN",
        f"{found}: raw or HU?",
        "If they are HU set nifti_hu=as-is (--nifti-hu as-is), else csv, with slope and intercept in images.csv",
    )
