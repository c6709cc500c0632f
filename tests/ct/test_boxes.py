"""Pascal-VOC boxes of slices become boxes in the voxels of a stored volume."""

from dataclasses import fields

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from mmjepa.ct.batches import VolumeBatches
from mmjepa.ct.boxes import SliceBox, boxes_in_volume, read_boxes, read_voc, write_boxes
from mmjepa.ct.dicom import Slice
from mmjepa.ct.ingest import ingest_images, scan
from mmjepa.ct.store import VolumeStore
from mmjepa.ct.volume import Settings, canonical
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

VOC = """<annotation><size><width>{width}</width><height>40</height><depth>1</depth></size><object><name>{name}</name>
<bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object></annotation>"""
GOOD = {"width": 50, "name": "A", "left": 3, "top": 4, "right": 9, "bottom": 8}


def a_slice(uid, z, cosines=(1, 0, 0, 0, 1, 0)):
    known = dict.fromkeys(field.name for field in fields(Slice))
    return Slice(
        **known | {"sop_uid": uid, "position": (-20.0, -10.0, z), "orientation": cosines, "pixel_spacing": (0.5, 0.8)}
    )


def stack(boxes_by_slice, cosines=(1, 0, 0, 0, 1, 0)):
    """Slices 2 mm apart, a mask of what is drawn on them [R, A, S], the affine of the canonical volume, the drawn boxes."""
    slices = [a_slice(str(k), 2.0 * k, cosines) for k in range(len(boxes_by_slice))]
    mask = np.zeros((len(slices), 40, 50), dtype=np.int16)
    for k, boxes in enumerate(boxes_by_slice):
        for box in boxes:
            mask[k, box.top : box.bottom, box.left : box.right] = 1
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = np.array(cosines[:3]) * 0.8, np.array(cosines[3:]) * 0.5
    lps[:3, 2], lps[:3, 3] = [0, 0, 2], slices[0].position
    volume, affine = canonical(mask.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ lps)
    return slices, volume, affine, {str(k): boxes for k, boxes in enumerate(boxes_by_slice)}


def write_slice(path, uid, k):
    """A slice of air at z = 2 k mm, with 500 HU where the drawing of ``GOOD`` lies on the slices 1 and 2."""
    raw = np.full((40, 50), 24, dtype=np.uint16)
    if k in (1, 2):
        raw[4:8, 3:9] = 1524
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = CTImageStorage, f"{uid}.{k}", uid
    data.PatientID, data.Modality, data.ImageType = "P", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PixelSpacing, data.ImageOrientationPatient = [0.7, 0.7], [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [0, 0, 2.0 * k]
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 50, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = raw.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def filled(boxes, shape):
    mask = np.zeros(shape, dtype=np.int16)
    for box in boxes:
        mask[tuple(slice(a, b) for a, b in zip(box.low, box.high, strict=True))] = 1
    return mask


@given(
    left=st.integers(0, 40), top=st.integers(0, 30), wide=st.integers(1, 10), tall=st.integers(1, 10),
    cosines=st.sampled_from([(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0)]),
)  # fmt: skip
def test_a_box_covers_exactly_the_voxels_it_was_drawn_on(left, top, wide, tall, cosines):
    box = SliceBox("A", left, top, left + wide, top + tall)
    slices, mask, affine, drawn = stack([[], [box], [box], []], cosines)
    boxes = boxes_in_volume(drawn, slices, affine, mask.shape)
    assert len(boxes) == 1
    np.testing.assert_array_equal(filled(boxes, mask.shape), mask)


def test_what_is_apart_or_of_another_label_stays_apart_and_what_touches_is_joined_by_chain():
    a, b, far = SliceBox("A", 2, 2, 6, 6), SliceBox("A", 5, 5, 9, 9), SliceBox("A", 30, 30, 34, 34)
    slices, mask, affine, drawn = stack([[a], [b, far], [], [a], [SliceBox("B", 2, 2, 6, 6)]])
    boxes = boxes_in_volume(drawn, slices, affine, mask.shape)
    assert [box.label for box in boxes] == ["A", "A", "A", "B"]
    assert sorted((box.high[2] - box.low[2], box.high[0] - box.low[0]) for box in boxes) == [
        (1, 4),
        (1, 4),
        (1, 4),
        (2, 7),
    ]


def test_order_of_slices_and_boxes_changes_nothing():
    slices, mask, affine, drawn = stack([[SliceBox("A", k, k, k + 5, k + 5)] for k in range(6)])
    first = boxes_in_volume(drawn, slices, affine, mask.shape)
    assert boxes_in_volume(drawn, slices[::-1], affine, mask.shape) == first
    assert len(first) == 1


def test_boxes_of_another_series_are_left_out_and_boxes_beyond_the_volume_refused():
    slices, mask, affine, drawn = stack([[SliceBox("A", 1, 1, 3, 3)]] * 2)
    assert boxes_in_volume({"else": drawn["0"]}, slices, affine, mask.shape) == []
    with pytest.raises(Refusal, match="BOX_OUTSIDE"):
        boxes_in_volume({"0": [SliceBox("A", 1, 1, 60, 3)]}, slices, affine, mask.shape)


def test_a_file_is_read_under_the_name_of_its_slice(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/1.2.3.xml").write_text(VOC.format(**GOOD))
    boxes, refused = read_voc(tmp_path)
    assert boxes == {"1.2.3": [SliceBox("A", 3, 4, 9, 8)]}
    assert not refused
    with pytest.raises(Refusal, match="BOXES_MISSING"):
        read_voc(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "BOX_UNREADABLE"),
        ("<html/>", "BOX_UNREADABLE"),
        (VOC.format(**GOOD)[:-9], "BOX_UNREADABLE"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + VOC.format(**GOOD), "BOX_UNREADABLE"),
        (VOC.format(**GOOD | {"right": 3}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"right": 51}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"top": -1}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"top": "nan"}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"top": "inf"}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"top": ""}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"width": "wide"}), "BOX_INVALID"),
        (VOC.format(**GOOD | {"name": " "}), "BOX_INVALID"),
    ],
)
def test_a_bad_file_is_counted_under_its_code_and_stops_no_other(tmp_path, content, code):
    (tmp_path / "1.xml").write_text(content)
    (tmp_path / "2.xml").write_text(VOC.format(**GOOD))
    boxes, refused = read_voc(tmp_path)
    assert refused == {code: 1}
    assert list(boxes) == ["2"]


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_crash_the_reader(tmp_path_factory, noise, place):
    folder, good = tmp_path_factory.mktemp("voc"), VOC.format(**GOOD).encode()
    (folder / "1.xml").write_bytes(good[:place] + noise + good[place + len(noise) :])
    boxes, refused = read_voc(folder)
    assert len(boxes) + sum(refused.values()) == 1


def test_boxes_come_by_the_image_that_was_ingested_and_images_without_any_are_left_out(tmp_path):
    source, notes, crosswalk = tmp_path / "dicom", tmp_path / "notes", Crosswalk.none("a salt for tests")
    notes.mkdir()
    for series, uid in (("a", "1.2.1"), ("b", "1.2.2")):
        for k in range(5):
            write_slice(source / series / f"{k}.dcm", uid, k)
    for k in (1, 2):
        (notes / f"1.2.1.{k}.xml").write_text(VOC.format(**GOOD))
    (notes / "bad.xml").write_text("")
    ingest_images(source, tmp_path / "out", crosswalk=crosswalk)
    store = VolumeStore(tmp_path / "out")
    boxes, refused = read_boxes(notes, source, store, crosswalk)
    assert refused == {"BOX_UNREADABLE": 1}
    image = crosswalk.image_id("1.2.1")
    ((only, (box,)),) = boxes.items()
    assert only == image
    volume = np.asarray(store.hu(image))
    assert (volume == 500).sum() == 2 * 6 * 4
    assert (volume[tuple(slice(a, b) for a, b in zip(box.low, box.high, strict=True))] == 500).all()
    made = VolumeBatches(store, list(boxes), size=(12, 12, 4), batch=1, seed=0, boxes=boxes)
    for epoch in range(5):
        assert (made.sample(image, epoch)[1].hu == 500).sum() == 2 * 6 * 4


def test_written_boxes_are_given_by_the_store_and_one_bad_volume_stops_no_other(tmp_path):
    source, notes, crosswalk = tmp_path / "dicom", tmp_path / "notes", Crosswalk.none("a salt for tests")
    notes.mkdir()
    for uid in ("1.2.1", "1.2.2", "1.2.3"):
        for k in range(5):
            write_slice(source / uid / f"{k}.dcm", uid, k)
    for k in (1, 2):
        (notes / f"1.2.1.{k}.xml").write_text(VOC.format(**GOOD))
    (notes / "1.2.2.1.xml").write_text(VOC.format(**GOOD | {"width": 500, "right": 90}))
    ingest_images(source, tmp_path / "out", crosswalk=crosswalk)
    said = write_boxes(notes, source, tmp_path / "out", crosswalk)
    assert said == {"boxes": 1, "images": 1, "refused": {"BOX_OUTSIDE": 1}}
    store, (image, *without) = VolumeStore(tmp_path / "out"), map(crosswalk.image_id, ("1.2.1", "1.2.2", "1.2.3"))
    assert store.boxes(image) == read_boxes(notes, source, store, crosswalk)[0][image]
    assert [store.boxes(other) for other in without] == [[], []]
    with pytest.raises(Refusal, match="IMAGE_UNKNOWN"):
        store.boxes("none")
    table = tmp_path / "out" / "ct" / "boxes.parquet"
    assert b"1.2.1" not in table.read_bytes()
    table.write_bytes(b"torn")
    with pytest.raises(Refusal, match="BOXES_BROKEN"):
        VolumeStore(tmp_path / "out").boxes(image)


@pytest.mark.real_data
def test_the_boxes_of_a_real_scan_lie_in_their_volumes_and_hold_the_tumour(data_folder, tmp_path):
    crosswalk = Crosswalk.none("a salt for tests")
    ingest_images(data_folder / "chest_ct", tmp_path / "out", crosswalk=crosswalk)
    store, folder = VolumeStore(tmp_path / "out"), data_folder / "chest_ct"
    (drawn, _), (boxes, refused) = (
        read_voc(folder / "boxes_A0002"),
        read_boxes(folder / "boxes_A0002", folder, store, crosswalk),
    )
    assert not refused
    depths = []
    for found in scan(folder, crosswalk, Settings())[0]:
        image = found.image_id
        (box,) = boxes.pop(image)
        depths.append(box.high[2] - box.low[2])
        volume = np.asarray(store.hu(image))
        for part in found.parts:  # a tumour, and the other lung at its mirrored place
            for flat in boxes_in_volume(drawn, [part], store.affine(image), volume.shape):
                region = tuple(slice(a, b) for a, b in zip(flat.low, flat.high, strict=True))
                assert volume[region].mean() > volume[::-1][region].mean() + 80
    assert sorted(depths) == [8, 10]
    assert not boxes
