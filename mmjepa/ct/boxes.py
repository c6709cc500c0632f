"""Boxes that readers drew slice by slice (Pascal-VOC XML, one file a slice) -> boxes in the voxels of stored volumes.

A file is named after its slice's SOPInstanceUID, as in the TCIA collection Lung-PET-CT-Dx (doi.org/10.7937/TCIA.2020.NNC2-0461).
xmin, ymin, xmax, ymax are taken as edges between pixels counted from the slice's upper left corner: a box covers the pixels xmin up to,
not including, xmax. Boxes of one label on neighbouring slices that overlap are one box in space.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from mmjepa.ct.crop import Box, Size
from mmjepa.ct.dicom import Slice
from mmjepa.ct.scan import scan
from mmjepa.ct.store import BOX_EDGES, VolumeStore
from mmjepa.ct.volume import Settings
from mmjepa.files import atomic_path
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class SliceBox:
    """A rectangle on one slice, in pixels: columns left .. right and rows top .. bottom, the ends not included."""

    label: str
    left: int
    top: int
    right: int
    bottom: int


def write_boxes(
    annotations: Path | str, source: Path | str, cohort: Path | str, crosswalk: Crosswalk
) -> dict[str, int | dict[str, int]]:
    """Put the boxes of the stored volumes into ``<cohort>/ct/boxes.parquet``, from which ``VolumeStore.boxes`` gives them.

    The arguments and refusals of ``read_boxes``. The table's columns: image_id, label, low_x .. low_z and high_x .. high_z (voxels,
    high exclusive). Returns the number of boxes, of images with any, and of refusals by code.
    """
    store = VolumeStore(cohort)
    boxes, refused = read_boxes(annotations, source, store, crosswalk)
    rows = [(image, box.label, *box.low, *box.high) for image in sorted(boxes) for box in boxes[image]]
    with atomic_path(store.folder / "boxes.parquet") as temporary:
        pd.DataFrame(rows, columns=["image_id", "label", *BOX_EDGES]).to_parquet(temporary, index=False)
    return {"boxes": len(rows), "images": len(boxes), "refused": dict(refused)}


def read_boxes(
    annotations: Path | str, source: Path | str, store: VolumeStore, crosswalk: Crosswalk
) -> tuple[dict[str, list[Box]], Counter[str]]:
    """The boxes of every stored volume that has any, by image_id, and how many refusals there were, by code: of annotation files
    (``read_voc``), and BOX_OUTSIDE or CT_NO_GEOMETRY of volumes, whose boxes are then left out.

    source, crosswalk: the DICOM folder that the store was ingested from and the same crosswalk; its headers are read again, because
    the store does not keep the UIDs that the annotations are named after. Raises Refusal BOXES_MISSING, and those of the store.
    """
    drawn, refused = read_voc(annotations)
    stored, boxes = set(store.index["image_id"]), {}
    for found in scan(Path(source), crosswalk, Settings()).found:
        image = found.image_id
        if found.kind != "dicom" or image not in stored:
            continue
        affine, shape = store.affine(image), store.shape(image)
        try:
            if some := boxes_in_volume(drawn, found.parts, affine, shape):
                boxes[image] = some
        except Refusal as refusal:
            refused[refusal.code] += 1
    return boxes, refused


def read_voc(folder: Path | str) -> tuple[dict[str, list[SliceBox]], Counter[str]]:
    """Every ``*.xml`` below a folder: the boxes by SOPInstanceUID, and how many files were refused, by code.

    BOX_UNREADABLE: no Pascal-VOC XML. BOX_INVALID: a box without label or area, or beyond the size that the file states.
    Raises Refusal BOXES_MISSING when there is no such file.
    """
    paths = sorted(Path(folder).rglob("*.xml"))
    if not paths:
        raise Refusal("BOXES_MISSING", f"no XML file in {folder}", "Name the folder that holds the annotations")
    boxes: dict[str, list[SliceBox]] = {}
    refused: Counter[str] = Counter()
    for number, path in enumerate(paths, start=1):
        try:
            boxes[path.stem] = boxes.get(path.stem, []) + _read_file(path, number)
        except Refusal as refusal:
            refused[refusal.code] += 1
    return boxes, refused


def _read_file(path: Path, number: int) -> list[SliceBox]:
    try:
        content = path.read_bytes()
        if len(content) > _MAX_BYTES or b"<!" in content.replace(b"<!--", b""):  # no DTD, so no entities that multiply
            raise ValueError
        root = ElementTree.fromstring(content)
        if root.tag != "annotation":
            raise ValueError
    except (OSError, ValueError, LookupError, ElementTree.ParseError):
        raise Refusal("BOX_UNREADABLE", f"annotation file {number} is no Pascal-VOC XML") from None
    return [_slice_box(item, root, number) for item in root.iter("object")]


def _slice_box(item: ElementTree.Element, root: ElementTree.Element, number: int) -> SliceBox:
    try:
        label = (item.findtext("name") or "").strip()
        edges = [round(float(item.findtext(f"bndbox/{edge}") or "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        width, height = (int(root.findtext(f"size/{side}") or "") for side in ("width", "height"))
        left, top, right, bottom = edges
        if not (label and 0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError
    except (ValueError, OverflowError):
        raise Refusal("BOX_INVALID", f"annotation file {number} holds a box without label, area or place") from None
    return SliceBox(label, left, top, right, bottom)


def boxes_in_volume(
    drawn: Mapping[str, Sequence[SliceBox]], slices: Sequence[Slice], affine: np.ndarray, shape: Size
) -> list[Box]:
    """The boxes of a volume that was made of ``slices`` (``Candidate.parts``) and stored with ``affine`` (4 x 4, voxel -> RAS mm).

    Boxes of other slices are left out: annotations cover several series. Raises Refusal BOX_OUTSIDE when a box lies beyond the volume:
    annotation and image do not belong together.
    """
    to_voxel = np.linalg.inv(affine)
    found = []
    for part in slices:
        for box in drawn.get(part.sop_uid, ()):
            low, high = _place(box, part, to_voxel)
            if min(low) < 0 or any(b > n for b, n in zip(high, shape, strict=True)):
                raise Refusal("BOX_OUTSIDE", "a box lies beyond the volume of its slice", "Are these its annotations?")
            found.append(Box(box.label, low, high))
    return list(_joined(found))


def _place(box: SliceBox, part: Slice, to_voxel: np.ndarray) -> tuple[Size, Size]:
    """The voxels under a rectangle, from the slice's own position and cosines (LPS mm)."""
    if part.position is None or part.orientation is None or part.pixel_spacing is None:
        raise Refusal("CT_NO_GEOMETRY", "a slice with a box has no position", "Ingest says which series it refuses")
    cosines = np.array(part.orientation)
    corners = np.array([[box.left, box.top], [box.right - 1, box.bottom - 1]])  # the centres of its outermost pixels
    lps = np.array(part.position) + corners[:, :1] * part.pixel_spacing[1] * cosines[:3]
    lps = lps + corners[:, 1:] * part.pixel_spacing[0] * cosines[3:]
    ras = lps * [-1, -1, 1]
    voxels = np.rint(ras @ to_voxel[:3, :3].T + to_voxel[:3, 3]).astype(int)
    (a, b, c), (x, y, z) = voxels.min(axis=0).tolist(), (voxels.max(axis=0) + 1).tolist()
    return (a, b, c), (x, y, z)


def _joined(boxes: Sequence[Box]) -> Iterator[Box]:
    """Hulls of the boxes of one label that are linked by touching: neighbours along an axis, overlapping along the others."""
    left = sorted(boxes, key=lambda box: (box.label, box.low[::-1], box.high))
    while left:
        members, left = [left[0]], left[1:]
        for member in members:  # grows while it is walked
            linked = [box for box in left if _touch(member, box)]
            members += linked
            left = [box for box in left if box not in linked]
        a, b, c = np.min([box.low for box in members], axis=0).tolist()
        x, y, z = np.max([box.high for box in members], axis=0).tolist()
        yield Box(members[0].label, (a, b, c), (x, y, z))


def _touch(one: Box, other: Box) -> bool:
    overlaps = [
        min(h1, h2) - max(l1, l2) for l1, h1, l2, h2 in zip(one.low, one.high, other.low, other.high, strict=True)
    ]
    return one.label == other.label and min(overlaps) >= 0 and sum(overlap == 0 for overlap in overlaps) <= 1
