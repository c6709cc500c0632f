import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmjepa.evaluate.tables import (
    EmbeddingTable,
    ScoreTable,
    join,
    read_embeddings,
    read_labels,
    read_scores,
    write_embeddings,
    write_scores,
)
from mmjepa.refusal import Refusal

DAY = np.datetime64("2020-01-01T08:00:00.000001", "us")


def times(n):
    return DAY + np.arange(n) * np.timedelta64(1, "h")


def table(n=4, width=3, split=True):
    z = np.arange(n * width, dtype=np.float32).reshape(n, width)
    return EmbeddingTable(np.arange(n) + 10, times(n), z, np.array(["train"] * n) if split else None, {"model": "m"})


def columns(n=4, **over):
    made = {
        "subject_id": pa.array(range(n), pa.int64()),
        "prediction_time": pa.array(times(n)),
        "z": pa.array([[1.0, 2.0]] * n, pa.list_(pa.float32())),
    }
    return {**made, **over}


def code_of(call, *arguments, **keywords):
    with pytest.raises(Refusal) as caught:
        call(*arguments, **keywords)
    return caught.value.code


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    z=arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-1e6, 1e6, width=32)),
    split=st.booleans(),
)
def test_a_table_written_and_read_is_the_same_bits(tmp_path_factory, z, split):
    path = tmp_path_factory.mktemp("t") / "e.parquet"
    made = EmbeddingTable(np.arange(len(z)), times(len(z)), z, np.array(["held_out"] * len(z)) if split else None)
    write_embeddings(path, made)
    back = read_embeddings(path)
    assert back.z.tobytes() == made.z.tobytes()
    assert (back.subject_id == made.subject_id).all()
    assert (back.prediction_time == made.prediction_time).all()
    assert (back.split is None) == (not split)


def test_the_file_is_a_fixed_size_list_of_float32_and_facts_lie_beside_it(tmp_path):
    write_embeddings(tmp_path / "e.parquet", table())
    assert pq.read_schema(tmp_path / "e.parquet").field("z").type == pa.list_(pa.float32(), 3)
    facts = json.loads((tmp_path / "e.json").read_text())
    assert (facts["model"], facts["rows"], facts["width"]) == ("m", 4, 3)
    assert read_embeddings(tmp_path / "e.parquet").facts["model"] == "m"


def test_an_existing_table_is_never_overwritten(tmp_path):
    write_embeddings(tmp_path / "e.parquet", table())
    assert code_of(write_embeddings, tmp_path / "e.parquet", table()) == "OUTPUT_EXISTS"


def test_a_table_that_is_not_the_described_one_is_refused(tmp_path):
    write_embeddings(tmp_path / "e.parquet", table())
    pq.write_table(pa.table(columns()), tmp_path / "e.parquet")
    assert code_of(read_embeddings, tmp_path / "e.parquet") == "TABLE_FINGERPRINT"


@pytest.mark.parametrize(
    ("over", "code"),
    [
        ({"z": None}, "TABLE_COLUMN"),
        ({"prediction_time": None}, "TABLE_COLUMN"),
        ({"z": pa.array([[1.0], [1.0, 2.0], [1.0], [1.0]])}, "TABLE_RAGGED"),
        ({"z": pa.array([[1.0], None, [1.0], [1.0]])}, "TABLE_RAGGED"),
        ({"z": pa.array([[1.0], [None], [1.0], [1.0]])}, "TABLE_RAGGED"),
        ({"z": pa.array([1.0, 2.0, 3.0, 4.0])}, "TABLE_COLUMN"),
        ({"z": pa.array([["a"], ["b"], ["c"], ["d"]])}, "TABLE_COLUMN"),
        ({"z": pa.array([[1.0], [float("nan")], [1.0], [1.0]])}, "TABLE_NOT_FINITE"),
        ({"z": pa.array([[1.0], [1e300], [1.0], [1.0]])}, "TABLE_NOT_FINITE"),
        ({"subject_id": pa.array([1, 1, 2, 3]), "prediction_time": pa.array([DAY] * 4)}, "TABLE_DUPLICATE"),
        ({"subject_id": pa.array([1, None, 2, 3])}, "TABLE_KEY_NULL"),
        ({"prediction_time": pa.array(["2020"] * 4)}, "TABLE_KEY_NULL"),
        ({"split": pa.array(["train", "test", "train", "train"])}, "TABLE_SPLIT"),
        (
            {"subject_id": pa.array([1, 1, 2, 3]), "split": pa.array(["train", "held_out", "train", "train"])},
            "SPLIT_OVERLAP",
        ),
    ],
)
def test_a_bad_table_is_refused_with_its_code(tmp_path, over, code):
    made = {key: value for key, value in columns(**over).items() if value is not None}
    pq.write_table(pa.table(made), tmp_path / "e.parquet")
    assert code_of(read_embeddings, tmp_path / "e.parquet") == code


def test_a_foreign_table_needs_only_keys_and_z_and_any_time_unit(tmp_path):
    whole = pa.array(np.array(["2020-01-01T08", "2020-01-02T08"], "datetime64[s]"))
    made = columns(2, prediction_time=whole.cast(pa.timestamp("ns")))
    pq.write_table(pa.table(made), tmp_path / "e.parquet")
    read = read_embeddings(tmp_path / "e.parquet")
    assert read.split is None
    assert read.prediction_time[0] == np.datetime64("2020-01-01T08", "us")


def test_broken_and_missing_files_are_refused(tmp_path):
    (tmp_path / "e.parquet").write_bytes(b"no parquet")
    assert code_of(read_embeddings, tmp_path / "e.parquet") == "TABLE_BROKEN"
    assert code_of(read_embeddings, tmp_path / "f.parquet") == "TABLE_MISSING"


def test_scores_keep_their_kind_and_probabilities_become_log_odds(tmp_path):
    scores = ScoreTable(np.arange(3), times(3), np.array([0.0, 0.5, 0.9]), "probability")
    write_scores(tmp_path / "s.parquet", scores)
    back = read_scores(tmp_path / "s.parquet")
    assert back.kind == "probability"
    assert back.log_odds[1:] == pytest.approx([0, np.log(9)])
    assert np.isfinite(back.log_odds).all()
    (tmp_path / "s.json").unlink()
    assert code_of(read_scores, tmp_path / "s.parquet") == "SCORE_KIND"
    assert code_of(ScoreTable, [1], times(1), [1.5], "probability") == "TABLE_NOT_FINITE"


def labels(ids, at, values):
    return pd.DataFrame({"subject_id": ids, "prediction_time": at, "value": pd.array(values, dtype="boolean")})


def test_join_counts_what_it_leaves_out():
    asked = labels([10, 11, 99, 12], [*times(3)[:2], DAY, times(3)[2]], [True, None, True, False])
    joined = join(table(), asked)
    assert joined.row.tolist() == [0, 2]
    assert joined.label_row.tolist() == [0, 3]
    assert joined.y.tolist() == [1, 0]
    assert joined.excluded == {"labels_without_value": 1, "labels_without_row": 1, "rows_without_label": 2}


def test_labels_of_a_folder_are_read_together_without_the_survival_sidecar(tmp_path):
    for name, ids in {"0.parquet": [1, 2], "deep/1.parquet": [3], "survival.parquet": [9]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frame = labels(ids, [DAY] * len(ids), [True] * len(ids))
        frame.rename(columns={"value": "boolean_value"}).astype({"boolean_value": bool}).to_parquet(tmp_path / name)
    assert sorted(read_labels(tmp_path)["subject_id"]) == [1, 2, 3]
    assert code_of(read_labels, tmp_path / "nothing") == "LABELS_MISSING"
    pq.write_table(pa.table(columns()), tmp_path / "0.parquet")
    assert code_of(read_labels, tmp_path) == "LABELS_KIND"
