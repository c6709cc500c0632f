"""Run the converters as people do, and what comes out through ``mmjepa ingest``; tiny made-up CT series."""

import json
import os
import runpy
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def convert_apart():
    """Run a converter as people do, in a process of its own: exit code, the JSON answer, and all that people see."""

    def run(name: str, *arguments: object) -> tuple[int, dict, str]:
        command = [sys.executable, str(_script(name)), *map(str, arguments), "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
        return done.returncode, json.loads(done.stdout), done.stdout + done.stderr

    return run


@pytest.fixture
def convert(monkeypatch, capfd):
    """The same in this process, which saves the seconds of starting one."""

    def run(name: str, *arguments: object) -> tuple[int, dict, str]:
        monkeypatch.setattr(sys, "argv", [str(_script(name)), *map(str, arguments), "--json"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        said = capfd.readouterr()
        return ended.value.code, json.loads(said.out), said.out + said.err

    return run


def _script(name: str) -> Path:
    return ROOT / "datasets" / name / "convert.py"


@pytest.fixture(scope="session")
def write_series():
    """``write_series(folder, patient, time)``: four CT slices of 8 x 8; returns their SOPInstanceUIDs."""

    def write(folder: Path, patient: str, time: datetime, modality: str = "CT") -> list[str]:
        folder.mkdir(parents=True)
        series, uids = generate_uid(), []
        for k in range(4):
            meta = FileMetaDataset()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
            data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, generate_uid(), series
            data.PatientID, data.Modality, data.ImageType = patient, modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
            data.PatientName = "Planted^Name"
            data.StudyDate = data.AcquisitionDate = f"{time:%Y%m%d}"
            data.AcquisitionTime = f"{time:%H%M%S}.{4 - k}"  # the earliest slice is not the first file
            data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.0 * k]
            data.PixelSpacing, data.SliceThickness = [1, 1], 2
            data.RescaleSlope, data.RescaleIntercept = 1, -1024
            data.Rows = data.Columns = 8
            data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
            data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
            data.PixelData = np.arange(64, dtype="<u2").tobytes()
            data.save_as(folder / f"1-{k}.dcm", enforce_file_format=True)
            uids.append(str(data.SOPInstanceUID))
        return uids

    return write


@pytest.fixture(scope="session")
def people():
    """``people(OUT)``: source patient -> (subject_id, date shift), from the crosswalk."""

    def read(out: Path) -> dict[str, tuple[int, pd.Timedelta]]:
        frame = pd.read_csv(out / "identity" / "crosswalk.csv", dtype={"patient_id": str})
        shifts = pd.to_timedelta(frame["date_shift_days"], unit="D")
        return dict(zip(frame["patient_id"], zip(frame["subject_id"], shifts, strict=True), strict=True))

    return read
