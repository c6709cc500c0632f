"""The voxels of DICOM files: decoded where they must be, turned to HU slice by slice.

Standard: DICOM PS3.3 C.11.1 (rescale), C.7.5.1.1.2 (pixel padding).
"""

import hashlib
import zlib
from io import BytesIO

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID, ImplicitVRLittleEndian

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


class Opened:
    """A file whose header was judged, with all its bytes; parsed anew only where its voxels need a decoder.

    Raises Refusal CT_PIXEL_CORRUPT when it cannot be read any more, CT_OUT_OF_LIMITS when it unpacks to more than its header
    announces.
    """

    def __init__(self, part: Slice, place: int) -> None:
        self.path = part.path
        try:
            self._content = part.path.read_bytes()
            self.sha256 = hashlib.sha256(self._content).digest()
            found = inflated(self._content, part.inflated_bytes) if part.inflated_bytes else None
        except (OSError, zlib.error):
            raise _corrupt(place) from None
        if found:
            self._content, whole = found
            if not whole:
                raise Refusal("CT_OUT_OF_LIMITS", f"slice {place} unpacks to more than its header announces")
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
                "CT_NO_RESCALE", "no rescale slope and intercept", "Set rescale=slope,intercept if you know them"
            )
        padding = None if part.padding is None else (raw >= part.padding[0]) & (raw <= part.padding[1])
        exact = shifted_hu(raw, factors[1], padding) if factors[0] == 1 else None
        if exact is not None:
            return exact
        values = raw.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number then is refused
            values *= factors[0]
            values += factors[1]
        return to_hu(values, padding)

    def _decoded(self, part: Slice, place: int) -> np.ndarray:
        try:
            with quiet():
                if self._data is None:
                    self._data = self._parsed(part)
                raw = pixel_array(self._data, index=part.frame)
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


def _corrupt(place: int) -> Refusal:
    return Refusal("CT_PIXEL_CORRUPT", f"pixel data of slice {place} truncated or undecodable")
