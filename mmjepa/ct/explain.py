"""Back from a salted id to files, for the owner of the source and of the salt."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.ct.scan import walk
from mmjepa.ct.volume import relative
from mmjepa.identity import Crosswalk
from mmjepa.refusal import Refusal


def files_of(item: str, source: Path, folder: Path, crosswalk: Crosswalk) -> list[str]:
    """The files, as paths below ``source``, that ``item`` stands for: an image_id (all files of its series) or the id of one file.

    folder: the cohort's ``ct``; what its last scan knows is looked up by hashing the paths below ``source`` again. No file is opened.
    Raises Refusal EXPLAIN_NO_SCAN, EXPLAIN_UNKNOWN, SOURCE_MISSING, SOURCE_UNREADABLE.
    """
    try:
        table = pq.read_table(folder / "scan.parquet", columns=["file", "group"])
        group = json.loads(table.schema.metadata[b"scan"])["groups"].get(item)
    except (OSError, pa.ArrowException, LookupError, ValueError):
        raise Refusal(
            "EXPLAIN_NO_SCAN", f"{folder} holds no finished scan", "Run the ingest again, without --explain"
        ) from None
    paths, closed = walk(source)
    names = [relative(path, source) for path in (*paths, *closed)]
    files = {name: crosswalk.image_id(f"file:{name}") for name in names}
    found = [name for name, file in files.items() if item in (file, crosswalk.image_id(name))]  # the latter: of NIfTI
    if not found and group:
        together = {row["file"] for row in table.to_pylist() if row["group"] == group}
        found = [name for name, file in files.items() if file in together]
    if not found:
        raise Refusal(
            "EXPLAIN_UNKNOWN",
            "no file of this source has this id under this salt",
            "Take the id, the source and the salt of the same ingest; see ct/manifest.csv",
        )
    return found
