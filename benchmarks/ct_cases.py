"""Malformed and odd CT inputs, as functions that fill a folder. What must become of each stands in ``ct_malformed.csv``.

The first twenty (``TABLE``) are edits of any chest series; the others start from a synthetic one. A file's name says what it is for:
``a*.dcm``, ``b*.dcm`` are the slices that volume a, b must hold where it is accepted, ``n*.nii`` likewise; all else is in the way.
"""

import gzip
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from mmjepa.keyed import generator
from synthetic.images import Scan, uid, write_dicom

ENHANCED_CT, MEDIA_DIRECTORY = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.1.3.10"
SIZE, DEPTH = (40, 36), 8
Slices = list[Any]
Build = Callable[[Path, Slices], object]
CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    """Register a function that fills a folder from a clean series; its files ``a*``, ``b*`` are what the volumes must hold."""
    CASES[build.__name__] = build
    return build


def synthetic_series(key: str = "a", patient: str = "P1", depth: int = DEPTH) -> Slices:
    """A clean chest series of noise in [-1000, 400] HU, 0.8 x 0.8 x 1 mm, from the feet up."""
    voxels = generator(0, f"malformed/{key}").integers(-1000, 400, (*SIZE, depth)).astype(np.int16)
    protocol = {"contrast": False, "thickness_mm": 2.0, "kernel": "B40f", "voxel_mm": 0.8}
    place = (-20.5, 31.0, -100.0)
    scan = Scan("s", uid("malformed", key), patient, "F", datetime(2020, 3, 1, 10, 15), place, voxels, protocol)
    with tempfile.TemporaryDirectory() as folder:
        write_dicom(scan, Path(folder))
        return [pydicom.dcmread(path) for path in sorted((Path(folder) / "s").iterdir())]


def real_series(data: Path | None) -> Slices | None:
    """The real chest series of the optional data folder."""
    folder = data / "chest_ct" / "A0002_B40f" if data else None
    return [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))] if folder and folder.is_dir() else None


def save(folder: Path, slices: Slices, volume: str = "a") -> list[Path]:
    """Write slices as ``<volume>_000.dcm`` and on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{volume}_{k:03d}.dcm" for k in range(len(slices))]
    for path, part in zip(paths, slices, strict=True):
        part.save_as(path, enforce_file_format=True)
    return paths


def tagged(*which: int, **tags: Any) -> Build:
    """A case that sets tags (None deletes) in some slices, all when none is named."""

    def build(folder: Path, slices: Slices) -> object:
        for part in [slices[k] for k in which] or slices:
            for name, value in tags.items():
                if value is not None:
                    setattr(part, name, value)
                elif name in part:
                    delattr(part, name)
        return save(folder, slices)

    return build


def stored(part: Dataset, raw: np.ndarray) -> None:
    """Put other stored values into a slice."""
    part.Rows, part.Columns = raw.shape
    part.PixelData = raw.astype("<i2" if part.PixelRepresentation else "<u2").tobytes()


# The twenty rows of the contract's table


CASES["clean"] = save
CASES["instance_number_absent"] = tagged(InstanceNumber=None)
CASES["rescale_absent"] = tagged(RescaleSlope=None, RescaleIntercept=None)
CASES["modality_mr"] = tagged(Modality="MR")
CASES["one_slice"] = lambda folder, slices: save(folder, slices[:1])
CASES["empty_folder"] = lambda folder, slices: None
CASES["two_slices_missing"] = lambda folder, slices: save(folder, slices[:3] + slices[5:])


@case
def duplicate_slice(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    slices[3].SOPInstanceUID = uid("another")
    stored(slices[3], slices[3].pixel_array[::-1])
    save(folder, slices[3:4], "x")


@case
def two_reconstructions(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    for k, part in enumerate(slices):
        part.SeriesInstanceUID, part.SOPInstanceUID = uid("other kernel"), uid("other kernel", k)
        stored(part, part.pixel_array[::-1])
    save(folder, slices, "b")


@case
def instance_number_scrambled(folder: Path, slices: Slices) -> None:
    for part, number in zip(slices, generator(0, "scrambled").permutation(len(slices)), strict=True):
        part.InstanceNumber = int(number)
    save(folder, slices)


@case
def one_truncated_file(folder: Path, slices: Slices) -> None:
    path = save(folder, slices)[4]
    path.write_bytes(path.read_bytes()[: -len(slices[4].PixelData) // 2])


@case
def junk_files(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 100)
    (folder / "readme.txt").write_text("nothing here")
    (folder / "x.dcm").write_bytes(b"not DICOM whatever its name says" * 20)


@case
def localizer_same_uid(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    scout = slices[0]
    scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], uid("scout")
    scout.ImageOrientationPatient, scout.ImagePositionPatient = [1, 0, 0, 0, 0, -1], [-100, 0, 50]
    save(folder, [scout], "x")


@case
def intercept_per_slice(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        part.RescaleIntercept = -1024 - k % 5
    save(folder, slices)


@case
def one_slice_of_another_matrix(folder: Path, slices: Slices) -> None:
    stored(slices[3], slices[3].pixel_array[::2, ::2].copy())
    save(folder, slices)


def _placed(slices: Slices, heights_mm: Sequence[float], sideways: float) -> Slices:
    for part, height in zip(slices, heights_mm, strict=True):
        part.ImageOrientationPatient, part.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-100, sideways * height, height]
    return slices


@case
def tilted(folder: Path, slices: Slices) -> None:
    save(folder, _placed(slices, [2.371 * k for k in range(len(slices))], float(np.tan(np.radians(18.5)))))


@case
def tilted_and_irregular(folder: Path, slices: Slices) -> None:
    steps = [5.0 if k < len(slices) // 2 else 7.5 for k in range(len(slices))]
    save(folder, _placed(slices, list(np.cumsum(steps)), 0.3))


@case
def exam_summary(folder: Path, slices: Slices) -> None:
    page = slices[0]
    page.SOPClassUID = page.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    save(folder, [page])


@case
def jpeg2000_without_class(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices[:8]):
        part.compress(JPEG2000Lossless, generate_instance_uid=False)
        part.SOPClassUID = ""
        pydicom.dcmwrite(folder / f"a_{k}.dcm", part)  # as it is: the class stays in the file meta alone


def enhanced(slices: Slices, stacks: int = 1, rescale: bool = True) -> Dataset:
    """One multi-frame file of classic slices; geometry and rescale in the functional groups. Frames are not in order."""

    def group(name: str, **tags: Any) -> dict[str, Items]:
        item = Dataset()
        for tag, value in tags.items():
            setattr(item, tag, value)
        return {name: Items([item])}

    def groups(*named: dict[str, Items]) -> Dataset:
        item = Dataset()
        for each in named:
            for name, value in each.items():
                setattr(item, name, value)
        return item

    first = slices[0]
    whole = pydicom.dcmread(BytesIO(_bytes_of(first)))
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = UID(ENHANCED_CT)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SliceLocation"):
        delattr(whole, name)
    for name in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        delattr(whole, name)
    order = [*range(1, len(slices), 2), *range(0, len(slices), 2)]
    whole.NumberOfFrames, whole.PixelData = len(slices), b"".join(slices[k].PixelData for k in order)
    shared = [group("PixelMeasuresSequence", PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)]
    shared.append(group("PlaneOrientationSequence", ImageOrientationPatient=first.ImageOrientationPatient))
    if rescale:
        hu = {"RescaleSlope": 1, "RescaleIntercept": first.RescaleIntercept, "RescaleType": "HU"}
        shared.append(group("PixelValueTransformationSequence", **hu))
    whole.SharedFunctionalGroupsSequence = Items([groups(*shared)])
    whole.PerFrameFunctionalGroupsSequence = Items(
        groups(
            group("PlanePositionSequence", ImagePositionPatient=slices[k].ImagePositionPatient),
            group(
                "FrameContentSequence",
                StackID=str(1 + k * stacks // len(slices)),
                InStackPositionNumber=k + 1,
                DimensionIndexValues=[1, k + 1],
            ),
        )
        for k in order
    )
    return whole


def _bytes_of(part: Dataset) -> bytes:
    buffer = BytesIO()
    part.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


CASES["enhanced_two_frames"] = lambda folder, slices: save(folder, [enhanced(slices[2:4])])
TABLE = tuple(CASES)
OPTIONS = {"enhanced_two_frames": {"min_slices": 2}}


# Other DICOM: headers


CASES["no_patient_id"] = tagged(PatientID=None)
CASES["two_patients_one_series"] = tagged(0, 1, 2, PatientID="P2")
CASES["position_missing_in_one"] = tagged(4, ImagePositionPatient=None)
CASES["pixel_spacing_missing"] = tagged(PixelSpacing=None)
CASES["pixel_spacing_zero"] = tagged(PixelSpacing=[0, 0.8])
CASES["orientation_not_orthonormal"] = tagged(ImageOrientationPatient=[1, 0.2, 0, 0, 1, 0])
CASES["orientation_zero"] = tagged(ImageOrientationPatient=[0, 0, 0, 0, 0, 0])
CASES["monochrome1"] = tagged(PhotometricInterpretation="MONOCHROME1")
CASES["burned_in"] = tagged(2, BurnedInAnnotation="YES")
CASES["spectral_map"] = tagged(RescaleType="Z_EFF")
CASES["rescale_absent_in_one"] = tagged(3, RescaleIntercept=None)
CASES["raw_values_of_a_chest"] = tagged(RescaleIntercept=0)
CASES["three_samples"] = tagged(SamplesPerPixel=3)
CASES["frames_in_a_classic_image"] = tagged(NumberOfFrames=3)
CASES["eight_bits_declared"] = tagged(BitsAllocated=8, BitsStored=8, HighBit=7)
CASES["thirty_two_bits_declared"] = tagged(BitsAllocated=32, BitsStored=32, HighBit=31)
CASES["derived_reformat"] = tagged(ImageType=["DERIVED", "SECONDARY", "AXIAL"])
CASES["thickness_lies"] = tagged(SliceThickness=5, SpacingBetweenSlices=0.3, SliceLocation=7)
CASES["future_dates"] = tagged(AcquisitionDate="29991231", SeriesDate="29991231", StudyDate="29991231")
CASES["very_long_strings"] = tagged(StudyDescription="x" * 60_000, ConvolutionKernel="K" * 5_000)
CASES["pixel_data_absent_in_one"] = tagged(2, PixelData=None)
CASES["series_uid_absent"] = tagged(SeriesInstanceUID=None)


@case
def rgb(folder: Path, slices: Slices) -> None:
    for part in slices:
        part.PixelData *= 3
    tagged(PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0)(folder, slices)


def spoiled(text: bytes, other: bytes, *which: int) -> Build:
    """A case that replaces bytes by as many others in the files of some slices, all when none is named."""

    def build(folder: Path, slices: Slices) -> None:
        paths = save(folder, slices)
        for path in [paths[k] for k in which] or paths:
            content = path.read_bytes()
            if text not in content or len(text) != len(other):
                raise ValueError(f"{text!r} cannot be replaced")
            path.write_bytes(content.replace(text, other))

    return build


CASES["decimal_comma"] = spoiled(b"0.8\\0.8", b"0,8\\0,8")
CASES["pixel_spacing_nan"] = spoiled(b"0.8\\0.8", b"nan\\0.8")
CASES["unknown_transfer_syntax"] = spoiled(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.9.9\0")
CASES["odd_length_field"] = lambda folder, slices: _odd(save(folder, slices))
CASES["header_cut"] = lambda folder, slices: save(folder, slices)[3].write_bytes(_bytes_of(slices[3])[:300])
CASES["zero_byte_slice"] = lambda folder, slices: (save(folder, slices), (folder / "x.dcm").write_bytes(b""))
CASES["no_preamble_implicit"] = lambda folder, slices: [
    part.save_as(folder / f"a_{k}", implicit_vr=True, little_endian=True)
    for k, part in enumerate(map(_without_meta, slices))
]


def _odd(paths: list[Path]) -> None:
    """A kernel of three letters with length 3: the standard wants even lengths, old writers do not care."""
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"SH\x04\0B40F", b"SH\x03\0B40"))


def _without_meta(part: Dataset) -> Dataset:
    bare = Dataset()
    bare.update({element.tag: element for element in part})
    return bare


@case
def private_tags(folder: Path, slices: Slices) -> None:
    for part in slices:
        block = part.private_block(0x0029, "SOME MAKER", create=True)
        block.add_new(0x10, "OB", bytes(range(256)) * 40)
        block.add_new(0x11, "SQ", [Dataset()])
    save(folder, slices)


@case
def oblique_and_sagittal(folder: Path, slices: Slices) -> None:
    other = synthetic_series("b")
    for stack, cosines in ((slices, [0.8, 0.6, 0, -0.6, 0.8, 0]), (other, [0, 1, 0, 0, 0, -1])):
        normal = np.cross(cosines[:3], cosines[3:])
        for k, part in enumerate(stack):
            part.ImageOrientationPatient, part.ImagePositionPatient = cosines, [float(10 + 2 * k * n) for n in normal]
    save(folder, slices)
    save(folder, other, "b")


# Other DICOM: voxels


@case
def constant(folder: Path, slices: Slices) -> None:
    for part in slices:
        stored(part, np.full_like(part.pixel_array, 5))
    save(folder, slices)


def _padded(slices: Slices, value: int) -> Slices:
    for part in slices:
        raw = part.pixel_array.astype(np.int64)
        raw[:4] = value % (1 << 16)
        stored(part, raw)
    return slices


CASES["padding_wrapped_undeclared"] = lambda folder, slices: save(folder, _padded(slices, -2000))
CASES["padding_wrapped_declared"] = lambda folder, slices: save(folder, _declared(_padded(slices, -2000), 63536))
CASES["padding_like_metal_declared"] = lambda folder, slices: save(folder, _declared(_padded(slices, 4000), 4000))


def _declared(slices: Slices, *ends: int) -> Slices:
    """PixelPaddingValue and, given a second value, PixelPaddingRangeLimit."""
    for part in slices:
        for tag, end in zip((0x00280120, 0x00280121), ends, strict=False):
            part.add_new(tag, "SS" if part.PixelRepresentation else "US", end)
    return slices


@case
def padding_range(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        _padded([part], 4000 + k)
    save(folder, _declared(slices, 4000, 4095))


@case
def padding_signed(folder: Path, slices: Slices) -> None:
    for part in slices:
        raw = part.pixel_array.astype(np.int64) - 1024
        raw[:3] = -2000
        part.PixelRepresentation, part.RescaleIntercept = 1, 0
        stored(part, raw)
    save(folder, _declared(slices, -2000))


def packed(syntax: UID) -> Build:
    """A case in another transfer syntax."""

    def build(folder: Path, slices: Slices) -> None:
        for part in slices:
            if syntax.is_encapsulated:
                part.compress(syntax, generate_instance_uid=False)
            part.file_meta.TransferSyntaxUID = syntax
        for k, part in enumerate(slices):
            pydicom.dcmwrite(folder / f"a_{k}.dcm", part, enforce_file_format=True)

    return build


CASES["implicit_little_endian"] = packed(ImplicitVRLittleEndian)
CASES["deflated"] = packed(DeflatedExplicitVRLittleEndian)
CASES["run_length"] = packed(RLELossless)


@case
def explicit_big_endian(folder: Path, slices: Slices) -> None:
    for k, part in enumerate(slices):
        plain = _without_meta(part)
        plain.PixelData = part.pixel_array.byteswap().tobytes()
        plain["PixelData"].VR = "OW"
        plain.file_meta = pydicom.dataset.FileMetaDataset()
        plain.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        pydicom.dcmwrite(folder / f"a_{k}.dcm", plain, implicit_vr=False, little_endian=False, enforce_file_format=True)


def claiming(side: int, syntax: UID | None = None) -> Build:
    """A case whose few bytes claim ``side`` x ``side`` voxels a slice; with 65535 that is 69 GB a series."""

    def build(folder: Path, slices: Slices) -> None:
        for part in slices:
            if syntax:
                part.compress(syntax, generate_instance_uid=False)
            part.Rows = part.Columns = side
        save(folder, slices)

    return build


CASES["run_length_bomb"] = claiming(65535, RLELossless)
CASES["uncompressed_bomb"] = claiming(65535)
CASES["run_length_too_short"] = claiming(512, RLELossless)
CASES["uncompressed_too_short"] = claiming(512)
CASES["jpeg2000_of_another_size"] = claiming(512, JPEG2000Lossless)
CASES["enhanced_two_stacks"] = lambda folder, slices: save(folder, [enhanced(slices, stacks=2)])
CASES["enhanced_whole"] = lambda folder, slices: save(folder, [enhanced(slices)])
CASES["enhanced_without_rescale"] = lambda folder, slices: save(folder, [enhanced(slices, rescale=False)])


@case
def enhanced_frame_missing(folder: Path, slices: Slices) -> None:
    save(folder, [enhanced(slices[:3] + slices[4:])])


@case
def enhanced_cut(folder: Path, slices: Slices) -> None:
    path = save(folder, [enhanced(slices)])[0]
    path.write_bytes(path.read_bytes()[:-500])


# Folders


@case
def two_patients(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    save(folder, synthetic_series("b", "P2"), "b")


@case
def bad_beside_good(folder: Path, slices: Slices) -> None:
    save(folder / "good", slices)
    other = synthetic_series("b", "P2")
    save(folder / "bad", other[:3] + other[5:], "x")


def _acquisitions(folder: Path, slices: Slices, number: int) -> None:
    other = synthetic_series("b")
    for k, part in enumerate(other):
        part.SeriesInstanceUID, part.SOPInstanceUID = slices[0].SeriesInstanceUID, uid("second acquisition", k)
        part.AcquisitionNumber = number
    save(folder, slices)
    save(folder, other, "b")


CASES["two_acquisitions"] = lambda folder, slices: _acquisitions(folder, slices, 2)
CASES["two_acquisitions_of_one_number"] = lambda folder, slices: _acquisitions(folder, slices, 1)
CASES["copied_file"] = lambda folder, slices: (save(folder, slices), save(folder, slices[2:3], "x"))
CASES["names_not_ascii"] = lambda folder, slices: save(folder / "Größe 胸部 é\u0301", slices)
CASES["folder_named_dcm"] = lambda folder, slices: save(folder / "1.dcm" / "2.nii", slices)
CASES["folders_in_a_loop"] = lambda folder, slices: (save(folder, slices), (folder / "loop").symlink_to(folder))
CASES["link_to_itself"] = lambda folder, slices: (save(folder, slices), (folder / "x").symlink_to(folder / "x"))
CASES["gzip_of_dicom"] = lambda folder, slices: (folder / "a.dcm.gz").write_bytes(gzip.compress(_bytes_of(slices[0])))


@case
def ten_thousand_tiny_files(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    for k in range(10_000):
        (folder / f"{k:05d}").write_bytes(b"%d" % k)


@case
def dicomdir(folder: Path, slices: Slices) -> None:
    save(folder, slices)
    listing = pydicom.dcmread(BytesIO(_bytes_of(slices[0])))
    listing.clear()
    listing.SOPClassUID = listing.file_meta.MediaStorageSOPClassUID = UID(MEDIA_DIRECTORY)
    listing.FileSetID, listing.DirectoryRecordSequence = "SET", []
    pydicom.dcmwrite(folder / "DICOMDIR", listing)


# NIfTI


def nifti(edit: Callable[[nib.Nifti1Image], object] = lambda image: None, name: str = "n.nii", **change: Any) -> Build:
    """A case of one NIfTI file and its table. change: values (a function of the HU array), affine, or table=False."""

    def build(folder: Path, slices: Slices) -> None:
        hu = generator(0, "malformed/nifti").integers(-1000, 400, (*SIZE, DEPTH)).astype(np.int16)
        affine = change.get("affine", np.array([[-0.8, 0, 0, 20], [0, 0.7, 0, -31], [0, 0, 2, -100], [0, 0, 0, 1.0]]))
        image = nib.Nifti1Image(change.get("values", lambda hu: hu)(hu), affine)
        image.header.set_xyzt_units("mm")
        edit(image)
        nib.save(image, folder / name)
        if change.get("table", True):
            (folder / "images.csv").write_text(f"file,patient_id,time\n{name},P9,2020-03-01T10:15:00\n")

    return build


def _codes(sform: int, qform: int) -> Callable[[nib.Nifti1Image], object]:
    return lambda image: (image.set_qform(image.affine, qform), image.set_sform(image.affine, sform))


def _with(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hu: np.where(np.arange(hu.size).reshape(hu.shape) == 77, np.float32(value), hu).astype(np.float32)


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
CASES["nifti_4d"] = nifti(values=lambda hu: np.stack([hu, hu], axis=-1))
CASES["nifti_2d"] = nifti(values=lambda hu: hu[:, :, 0])
CASES["nifti_one_slice"] = nifti(values=lambda hu: hu[:, :, :1])
CASES["nifti_constant"] = nifti(values=lambda hu: np.full_like(hu, -900))
CASES["nifti_raw"] = nifti(values=lambda hu: hu + 1024)
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
