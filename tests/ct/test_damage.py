"""Files that are cut, blanked, longer than they say or cannot be read: never a volume in silence."""

import os

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from mmjepa.ct import pixels
from mmjepa.ct.pixels import _unpacks_to


def beside(manifest):
    return [
        "CT_UNREADABLE_BESIDE" in volume["flags"] for volume in manifest["volumes"] if volume["status"] != "refused"
    ]


CUTS = {
    "empty": lambda content: b"",
    "cut in the preamble": lambda content: content[:100],
    "cut in the header": lambda content: content[:200],
    "mark lost": lambda content: content[:128] + b"XXXX" + content[132:],
}


@pytest.mark.parametrize("cut", list(CUTS))
def test_a_volume_whose_end_slice_may_be_a_damaged_file_beside_it_is_flagged_in_any_run(
    series_of, save, ingest, tmp_path, cut
):
    last = save(tmp_path / "source/a", series_of())[-1]
    save(tmp_path / "source/b", series_of())
    whole = last.read_bytes()
    assert beside(ingest()) == [False, False]
    last.write_bytes(CUTS[cut](whole))
    (tmp_path / "out").rename(tmp_path / "earlier")
    assert sorted(beside(ingest())) == [False, True]
    assert sorted(beside(ingest())) == [False, True]  # unchanged
    last.unlink()
    assert beside(ingest()) == [False, False]
    (tmp_path / "source/b/x.dcm").write_bytes(b"")
    assert sorted(beside(ingest())) == [False, True]


def test_what_never_was_a_slice_flags_nothing(series_of, save, ingest, tmp_path):
    save(tmp_path / "source", series_of())
    (tmp_path / "source/readme.txt").write_text("hello")
    assert beside(ingest()) == [False]


def deflated(series_of, save, tmp_path):
    slices = series_of()
    for part in slices:
        part.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        part.Rows = part.Columns = 64
        part.PixelData = np.random.default_rng(0).integers(0, 3000, (64, 64)).astype("<u2").tobytes()
    return save(tmp_path / "source", slices)


@pytest.mark.parametrize("damage", ["cut", "blanked"])
def test_a_deflated_stream_without_its_end_is_corrupt(series_of, save, ingest, tmp_path, damage):
    path = deflated(series_of, save, tmp_path)[2]
    content = path.read_bytes()
    path.write_bytes(content[:-40] + (bytes(40) if damage == "blanked" else b""))
    manifest = ingest()
    assert (manifest["accepted"], manifest["refused"]) == (0, {"CT_PIXEL_CORRUPT": 1})


def test_an_odd_file_meta_of_a_deflated_file_is_read_as_pydicom_reads_it(series_of, save, ingest, tmp_path):
    path = deflated(series_of, save, tmp_path)[-1]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x02\0\0\0UL\x04\0", b"\x02\0\0\0UL\x04\0", 1)[:140] + b"\x09" + content[141:])
    pydicom.dcmread(path)
    manifest = ingest()
    assert [volume["shape"][2] for volume in manifest["volumes"]] == [6]


def test_more_rows_than_announced_are_corrupt_and_padding_is_not(series_of, save, ingest, tmp_path):
    save(tmp_path / "source/a", series_of(Rows=4))
    save(tmp_path / "source/b", padded := series_of())
    for part in padded:
        part.PixelData += b"\0\0"
    save(tmp_path / "source/b", padded)
    manifest = ingest()
    assert (manifest["accepted"], manifest["refused"]) == (1, {"CT_PIXEL_CORRUPT": 1})


def run_lengths(slices, tail):
    for part in slices:
        part.compress(RLELossless, generate_instance_uid=False)
        frame = next(generate_frames(part.PixelData, number_of_frames=1))
        starts = np.frombuffer(frame[:64], "<u4")
        one, two = frame[starts[1] : starts[2]] + tail, frame[starts[2] :] + tail
        header = np.array([2, 64, 64 + len(one), *[0] * 13], "<u4").tobytes()
        part.PixelData = encapsulate([header + one + two])
    return slices


@pytest.mark.parametrize(
    ("tail", "accepted"), [(b"", 1), (b"\xfe\0", 1), (b"\x80\x80", 1), (b"\xfa\0", 0), (b"\x81\0" * (1 << 18), 0)]
)
def test_run_lengths_of_a_row_too_many_are_corrupt_before_they_are_unpacked(
    series_of, save, ingest, tmp_path, tail, accepted
):
    save(tmp_path / "source", run_lengths(series_of(), tail))
    manifest = ingest()
    assert manifest["accepted"] == accepted
    assert manifest["refused"] == ({} if accepted else {"CT_PIXEL_CORRUPT": 1})


def test_the_size_of_run_lengths_is_counted_by_the_standard():
    assert _unpacks_to(b"\x02abc" + b"\xfda" + b"\x80", 7)
    assert not _unpacks_to(b"\x02abc" + b"\xfda" + b"\x80", 8)


def test_a_file_far_larger_than_its_header_announces_is_refused_unread(series_of, save, ingest, tmp_path, monkeypatch):
    path = save(tmp_path / "source", series_of())[1]
    os.truncate(path, 3 << 30)
    manifest = ingest()
    assert (manifest["accepted"], manifest["refused"]) == (0, {"CT_OUT_OF_LIMITS": 1})


def test_jpeg_2000_is_not_left_to_a_decoder_that_dies_of_damaged_streams(
    series_of, save, ingest, tmp_path, monkeypatch
):
    pytest.importorskip("openjpeg")
    slices = series_of(Rows=64, Columns=64, PixelData=(np.arange(64 * 64, dtype="<u2") % 3000).tobytes())
    for part in slices:
        part.compress(JPEG2000Lossless, generate_instance_uid=False)
    save(tmp_path / "source", slices)
    plugins, honest = set(), pixels.pixel_array

    def seen(data, **options):
        plugins.add(options["decoding_plugin"])
        return honest(data, **options)

    monkeypatch.setattr(pixels, "pixel_array", seen)
    assert ingest()["accepted"] == 1
    assert plugins == {"pylibjpeg"}
