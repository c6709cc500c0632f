"""NIfTI files. They name neither person nor date: ``images.csv`` beside them does (columns file, patient_id, time)."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np

from mmjepa.ct.volume import (
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

_HEADER_BYTES = 540  # of NIfTI-2, the longer one
_MOST_ZIPPED = 1100  # gzip makes nothing smaller than a 1032nd
_SLACK_BYTES = 1 << 20  # some writers pad the end
TABLE = "images.csv"
COLUMNS = ("file", "patient_id", "time")
_HU_BELOW = -200  # some lung or air: raw scanner values and shifted ones are never negative


def looks_like_nifti(path: Path, head: bytes) -> bool:
    """By content (also inside gzip), or by a name that claims it."""
    if path.name.endswith((".nii", ".nii.gz")):
        return True
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(31).decompress(head, 352)
        except zlib.error:
            return False
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def candidates(files: Sequence[Path], source: Path, table: Path | None, crosswalk: Crosswalk) -> list[Candidate]:
    """One candidate for each NIfTI file and for each row of ``table`` whose file is absent. Raises Refusal IMAGES_CSV_*."""
    rows = _read_table(table) if table else {}
    root = table.parent if table else source
    found = [_judge(path, rows.pop(path.resolve(), None), root, crosswalk) for path in files]
    for number, values in rows.values():
        refusal = Refusal("NII_FILE_MISSING", f"{TABLE} row {number}: no such NIfTI file in the source folder")
        found.append(Candidate(crosswalk.image_id(values["file"]), "nifti", refusal=refusal))
    return found


def patients(table: Path) -> set[str]:
    """The patient ids that ``images.csv`` names."""
    return {values["patient_id"] for _, values in _read_table(table).values()} - {""}


def _read_table(table: Path) -> dict[Path, tuple[int, dict[str, str]]]:
    rows: dict[Path, tuple[int, dict[str, str]]] = {}
    for number, values in read_rows(table, COLUMNS, "IMAGES_CSV"):
        try:
            path = (table.parent / values["file"]).resolve()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
            raise Refusal("IMAGES_CSV_VALUE", f"{TABLE} row {number}: file is not a path") from None
        if path in rows:
            raise Refusal("IMAGES_CSV_DUPLICATE", f"{TABLE} rows {rows[path][0]} and {number} name the same file")
        rows[path] = (number, values)
    return rows


def _judge(path: Path, row: tuple[int, dict[str, str]] | None, root: Path, crosswalk: Crosswalk) -> Candidate:
    name = relative(path, root) if path.is_relative_to(root) else path.name
    image_id = crosswalk.image_id(name)
    try:
        if row is None or not row[1]["patient_id"]:
            raise Refusal(
                "CT_SUBJECT_MISSING",
                f"no patient for this NIfTI file in {TABLE}",
                f"Put {TABLE} beside the files, with the columns {','.join(COLUMNS)}",
            )
        number, values = row
        patient = values["patient_id"]
        subject = crosswalk.subject_id(patient)
        if subject is None:
            raise Refusal("CT_SUBJECT_UNKNOWN", "the patient is not in the crosswalk", "Add a row for this patient")
        moment = _moment(values["time"], number)
    except Refusal as refusal:
        return Candidate(image_id, "nifti", (path,), refusal=refusal)
    time = moment + timedelta(days=crosswalk.date_shift_days(patient)) if moment else None
    return Candidate(image_id, "nifti", (path,), subject, time, flags=() if time else ("CT_NO_TIME",))


def _moment(text: str, number: int) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo or len(text) <= len("2000-01-01"):
        raise Refusal("NII_TIME", f"{TABLE} row {number}: time is not an ISO date and time of the site's clock")
    return moment


def source_hash(path: Path) -> str:
    """Hash of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_volume(found: Candidate, settings: Settings) -> Volume:
    """Read and check one file. Raises Refusal NII_* and the CT codes of voxels (CT_TOO_FEW_SLICES, CT_CONSTANT, ...)."""
    try:
        content = found.parts[0].read_bytes()
        image = _open(content, settings)
        affine = _affine(image)
        _check_shape(image, settings)
        values = np.asarray(image.dataobj)
    except (Refusal, MemoryError):
        raise
    except Exception:  # gzip, zlib, nibabel and numpy each fail in their own way on broken bytes
        raise Refusal("NII_UNREADABLE", "not NIfTI, or truncated") from None
    hu = to_hu(_finite(values, settings))
    hu_range = check_hu(hu, None)
    return Volume(*canonical(hu, affine), hu_range, hashlib.sha256(content).hexdigest())


def _open(content: bytes, settings: Settings) -> nib.Nifti1Image:
    """The image in memory. What its header announces must be possible before any memory is taken for it."""
    zipped = content[:2] == b"\x1f\x8b"
    head = zlib.decompressobj(31).decompress(content, _HEADER_BYTES) if zipped else content[:_HEADER_BYTES]
    image_class = nib.Nifti2Image if head[4:7] == b"n+2" else nib.Nifti1Image
    header = image_class.header_class(head[: image_class.header_class.sizeof_hdr])
    settings.check_size(header.get_data_shape())
    voxels = math.prod(header.get_data_shape())
    announced = int(header["vox_offset"]) + voxels * header.get_data_dtype().itemsize
    if announced > len(content) * (_MOST_ZIPPED if zipped else 1):
        raise Refusal("NII_UNREADABLE", "not NIfTI, or truncated")
    return image_class.from_bytes(_unzipped(content, announced + _SLACK_BYTES) if zipped else content)


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
        raise Refusal("CT_TOO_FEW_SLICES", f"{min(shape)} slices, want >= {settings.min_slices}")
    if image.get_data_dtype().kind not in "iuf":
        raise Refusal("NII_UNREADABLE", "voxels are not real numbers")


def _affine(image: nib.Nifti1Image) -> np.ndarray:
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
    if degrees:
        raise Refusal(
            "CT_GANTRY_TILT", f"axes are {degrees:.1f} degrees off a right angle", "Straighten the volume first"
        )
    return affine


def _finite(values: np.ndarray, settings: Settings) -> np.ndarray:
    """Voxels as float32 HU."""
    values = values.astype(np.float32)
    broken = values.size - int(np.isfinite(values).sum())
    if broken:
        raise Refusal("NII_NONFINITE", f"{broken} NaN or infinite voxels")
    if values.min() == values.max():
        raise Refusal("CT_CONSTANT", f"all voxels equal {values.min():g}")
    if settings.nifti_hu == "auto" and values.min() >= _HU_BELOW:
        raise Refusal(
            "NII_HU_UNKNOWN",
            f"lowest value {values.min():.0f}: raw values or HU?",
            "Set nifti_hu=as-is if the voxels are HU",
        )
    return values
