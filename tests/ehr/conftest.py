"""Event stores in memory, for tests of the forms."""

import numpy as np
import pytest

from mmjepa.ehr.store import EventStore

HOUR_US = 3_600_000_000


@pytest.fixture(scope="session")
def make_store():
    """``make_store(events, statics=(), descriptions=None, more_codes=())`` without files.

    events: (subject, hour, code[, value[, hour when available[, hadm_id]]]); statics: (subject, code).
    """

    def make(events, statics=(), descriptions=None, more_codes=()):
        full = [(*row, *(np.nan, row[1], -1)[len(row) - 3 :]) for row in events]
        timed, static = sorted(full, key=lambda row: (row[0], row[4], row[1])), sorted(statics)
        ids = np.unique([row[0] for row in [*timed, *static]]).astype(np.int64)
        vocabulary = sorted({*more_codes, *(row[2] for row in timed), *(row[1] for row in static)})
        subject, hour, code, value, known, hadm = list(zip(*timed, strict=True)) or [()] * 6
        edges = np.append(ids, np.iinfo(np.int64).max)
        return EventStore(
            subjects=ids,
            offsets=np.searchsorted(np.array(subject, np.int64), edges),
            times_us=(np.array(hour, float) * HOUR_US).astype(np.int64),
            available_us=(np.array(known, float) * HOUR_US).astype(np.int64),
            codes=np.array([vocabulary.index(one) for one in code], np.int32),
            values=np.array(value, np.float32),
            static_offsets=np.searchsorted(np.array([row[0] for row in static], np.int64), edges),
            static_codes=np.array([vocabulary.index(row[1]) for row in static], np.int32),
            static_values=np.full(len(static), np.nan, np.float32),
            hadm_id=np.array(hadm, np.int64),
            image_rows=np.empty(0, np.int64),
            image_ids={},
            vocabulary=list(map(str, vocabulary)),
            descriptions=descriptions or {},
            splits={},
            fingerprint=repr((timed, static, sorted((descriptions or {}).items()), vocabulary)),
        )

    return make
