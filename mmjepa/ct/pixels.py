"""The voxels of DICOM files: decoded where they must be, turned to HU slice by slice.

Standard: DICOM PS3.3 C.11.1 (rescale), C.7.5.1.1.2 (pixel padding).
"""

import hashlib
import struct
from io import BytesIO

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder, pixel_array
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import UID, ImplicitVRLittleEndian, JPEG2000TransferSyntaxes, RLELossless

from mmjepa.ct.dicom import Slice, quiet
from mmjepa.ct.elements import inflated
from mmjepa.ct.volume import shifted_hu, to_hu
from mmjepa.refusal import Refusal


def check_decoder(syntax: str) -> None:
    """Refuse (CT_DECODER_MISSING) a transfer syntax that nothing installed here decodes."""
    uid = UID(syntax or ImplicitVRLittleEndian)
    try:
        available = get_decoder(uid).is_available
    except NotImplementedError:
        available = False
    if not available:
        name = uid.name if uid.is_transfer_syntax and not uid.is_private else "an unknown transfer syntax"
        raise Refusal("CT_DECODER_MISSING", f"no decoder for {name}", "Install the extra mmjepa[dicom]")


def _plugin(syntax: str) -> str:
    """The decoder to use, empty where any will do: GDCM dies of some damaged JPEG 2000 streams, OpenJPEG refuses them."""
    if syntax not in JPEG2000TransferSyntaxes:
        return ""
    return "pylibjpeg" if "pylibjpeg" in get_decoder(UID(syntax)).available_plugins else ""


class Opened:
    """A file whose header was judged, with all its bytes; parsed anew only where its voxels need a decoder.

    padding_voxels: how many voxels of ``hu`` were padding so far.
    Raises Refusal CT_PIXEL_CORRUPT when it cannot be read any more or its deflated stream is cut, CT_OUT_OF_LIMITS when it is larger, or
    unpacks to more, than its header announces.
    """

    def __init__(self, part: Slice, place: int) -> None:
        self.path, self.padding_voxels = part.path, 0
        try:
            if part.path.stat().st_size > part.most_bytes:
                raise Refusal("CT_OUT_OF_LIMITS", f"slice {place} is larger than its header announces")
            self._content = part.path.read_bytes()
        except OSError:
            raise _corrupt(place) from None
        self.sha256 = hashlib.sha256(self._content).digest()
        if part.deflated:
            content, whole = inflated(self._content, part.most_bytes) or (b"", False)
            if len(content) >= part.most_bytes:
                raise Refusal("CT_OUT_OF_LIMITS", f"slice {place} unpacks to more than its header announces")
            if not whole:
                raise _corrupt(place)
            self._content = content
        self._data: pydicom.FileDataset | None = None

    def hu(self, part: Slice, place: int, rescale: tuple[float, float] | None) -> np.ndarray:
        """Slice ``place`` of a stack as int16 HU [rows, columns]; ``part`` is of this file.

        rescale: stands in for absent tags. Raises Refusal CT_PIXEL_CORRUPT, CT_NO_RESCALE, CT_HU_IMPLAUSIBLE.
        """
        raw = part.plain.voxels(self._content, part.shape) if part.plain else None
        if raw is None:
            raw = self._decoded(part, place)
        factors = part.rescale or rescale
        if factors is None:
            raise Refusal(
                "CT_NO_RESCALE",
                "no rescale slope and intercept",
                "Set rescale=slope,intercept (--rescale SLOPE,INTERCEPT) if you know them",
            )
        padding = None if part.padding is None else (raw >= part.padding[0]) & (raw <= part.padding[1])
        self.padding_voxels += 0 if padding is None else int(np.count_nonzero(padding))
        exact = shifted_hu(raw, factors[1], padding) if factors[0] == 1 else None
        if exact is not None:
            return exact
        values = raw.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number then is refused
            values *= factors[0]
            values += factors[1]
        return to_hu(values, padding)

    def _decoded(self, part: Slice, place: int) -> np.ndarray:
        try:
            with quiet():
                if self._data is None:
                    self._data = self._parsed(part)
                    if _has_surplus(self._data):
                        raise _corrupt(place)
                raw = pixel_array(self._data, index=part.frame, decoding_plugin=_plugin(part.syntax))
        except MemoryError:
            raise
        except Exception:  # every decoder has errors of its own; or the file changed since its header was read
            raise _corrupt(place) from None
        if raw.shape != part.shape:
            raise Refusal(
                "CT_PIXEL_CORRUPT", f"pixel data of slice {place} has shape {raw.shape}, header says {part.shape}"
            )
        return raw

    def voxel_hash(self, part: Slice) -> str:
        """Hash of the stored voxels. Raises whatever broken bytes lead pydicom to."""
        with quiet():
            return hashlib.sha256(self._parsed(part).PixelData).hexdigest()

    def _parsed(self, part: Slice) -> pydicom.FileDataset:
        data = pydicom.dcmread(BytesIO(self._content), force=True)
        if not part.syntax:  # a bare data set: its voxels can only be uncompressed
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        return data


def _has_surplus(data: pydicom.FileDataset) -> bool:
    """Whether a row of voxels or more is stored beyond those that the header announces; decoders would drop it."""
    syntax, row_bytes = data.file_meta.TransferSyntaxUID, data.Columns * data.SamplesPerPixel * data.BitsAllocated // 8
    if not syntax.is_encapsulated:
        return len(data.PixelData) - get_expected_length(data) >= row_bytes
    if syntax != RLELossless:
        return False  # the stream states its own size, which is compared with the header's
    most = (data.Rows + 1) * data.Columns
    frames = generate_frames(data.PixelData, number_of_frames=int(data.get("NumberOfFrames") or 1))
    return any(_unpacks_to(segment, most) for frame in frames for segment in _segments(frame))


def _segments(frame: bytes) -> list[bytes]:
    """The run-length segments of a frame, by its header of 16 numbers (PS3.5 G.5)."""
    count, *starts = struct.unpack_from("<16I", frame)
    ends = [*starts[1:count], len(frame)]
    return [frame[start:end] for start, end in zip(starts[:count], ends, strict=True)]


def _unpacks_to(segment: bytes, size: int) -> bool:
    """Whether a run-length segment holds ``size`` bytes or more (PS3.5 G.3.2)."""
    at = held = 0
    while at < len(segment) and held < size:
        code = segment[at]
        if code < 128:
            held, at = held + code + 1, at + code + 2
        else:
            held, at = held + (257 - code) % 129, at + (2 if code > 128 else 1)
    return held >= size


def _corrupt(place: int) -> Refusal:
    return Refusal("CT_PIXEL_CORRUPT", f"pixel data of slice {place} truncated or undecodable")
