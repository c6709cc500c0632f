"""Reading a DICOM folder, and the whole ingest of it."""

import os
import sys
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from ct_parts.common import CROSSWALK, cpu_s, say
from mmjepa.ct import ingest, series
from mmjepa.ct.volume import Settings

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def source_of(data: Path | None, scratch: Path, small: bool) -> Path:
    """The folder that is read."""
    if data is None and "MMJEPA_DATA" in os.environ:
        data = Path(os.environ["MMJEPA_DATA"]) / "chest_ct"
    if data is not None:
        print("reading the DICOM folder that was named", file=sys.stderr)
        return data
    print("reading a generated DICOM series", file=sys.stderr)
    write_series(scratch / "dicom" / "a", *((5, 16) if small else (60, 512)))
    return scratch / "dicom"


def write_series(folder: Path, slices: int, edge: int) -> None:
    """A DICOM series of chest-like noise."""
    folder.mkdir(parents=True)
    rng, uid = np.random.default_rng(0), generate_uid()
    for k in range(slices):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CT_IMAGE, generate_uid(), uid
        data.PatientID, data.Modality, data.InstanceNumber = "P", "CT", k + 1
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.PixelSpacing, data.ImageOrientationPatient = [0.7, 0.7], [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient, data.SliceThickness = [0, 0, 5.0 * k], 5
        data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = edge, edge, 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = rng.integers(0, 2000, (edge, edge)).astype(np.uint16).tobytes()
        data.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def bare_hu(folders: list[Path]) -> list[np.ndarray]:
    """pydicom, a loop, and nothing else."""
    volumes = []
    for folder in folders:
        slices = []
        for path in sorted(folder.glob("*.dcm")):
            data = pydicom.dcmread(path)
            raw = data.pixel_array.astype(np.float32)  # float64 would be slower
            slices.append((raw * np.float32(data.RescaleSlope) + np.float32(data.RescaleIntercept)).astype(np.int16))
        volumes.append(np.stack(slices))
    return volumes


def monai_hu(folders: list[Path]) -> list[np.ndarray]:
    """MONAI's PydicomReader, a series at a time."""
    from monai.data import PydicomReader

    return [(reader := PydicomReader()).get_data(reader.read(str(folder)))[0] for folder in folders]


def our_hu(source: Path) -> list[np.ndarray]:
    """What ingest reads, before it writes."""
    settings = Settings()
    return [
        series.read_volume(found, settings).hu for found in ingest.scan(source, CROSSWALK, settings)[0] if found.parts
    ]


def reading(source: Path, scratch: Path, repeats: int) -> None:
    """Reading and the whole ingest."""
    folders = sorted({path.parent for path in source.rglob("*.dcm")})
    turn = iter(range(1000))

    def whole() -> None:
        ingest.ingest_images(source, scratch / f"cohort{next(turn)}", crosswalk=CROSSWALK)

    bare, monai, ours, all_of_it = cpu_s(
        repeats, lambda: bare_hu(folders), lambda: monai_hu(folders), lambda: our_hu(source), whole
    )
    say("read, bare pydicom / ours", bare / ours, 0.8, bare_s=bare, ours_s=ours)
    say("read, MONAI PydicomReader / ours", monai / ours, 2, monai_s=monai, ours_s=ours)
    say("ingest, bare pydicom / ours", bare / all_of_it, 0.4, bare_s=bare, ours_s=all_of_it)
