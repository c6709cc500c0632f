import numpy as np
import pandas as pd
import pytest

from mmjepa.baselines import BASELINES, FeatureState, features
from mmjepa.baselines.ehr_counts import fit_counts
from mmjepa.cohort import Cohort
from mmjepa.files import write_json
from mmjepa.refusal import Refusal

HOUR_US = 3_600_000_000
DAY0 = pd.Timestamp("2020-01-01")
SUBJECTS = np.arange(1, 13)
TRAIN = SUBJECTS[:8]


def at(hour):
    return DAY0 + pd.Timedelta(hours=hour)


def default_events():
    """A lab at hours 1 and 5 (the second known at hour 20), a code twice, a code of odd subjects, a static code."""
    rows = []
    for s in SUBJECTS:
        rows += [
            (s, None, "SEX//F", np.nan, None),
            (s, DAY0 - pd.Timedelta(days=50 * 365.25), "MEDS_BIRTH", np.nan, None),
            (s, at(1), "LAB//A", float(s), at(1)),
            (s, at(2), "DX//COMMON", np.nan, at(2)),
            (s, at(3), "DX//COMMON", np.nan, at(3)),
            (s, at(5), "LAB//A", 100.0 + s, at(20)),
            (s, at(30), "DX//FUTURE", np.nan, at(30)),
            (s, at(40), "MEDS_DEATH", np.nan, at(40)),
        ]
        if s > 8:
            rows.append((s, at(4), "DX//ONLY_OUTSIDE_TRAIN", np.nan, at(4)))
    return rows


def make_cohort(path, rows, images=True):
    (path / "ehr" / "data").mkdir(parents=True)
    (path / "ehr" / "metadata").mkdir()
    frame = pd.DataFrame(rows, columns=["subject_id", "time", "code", "numeric_value", "available_time"])
    for column in ("time", "available_time"):
        frame[column] = pd.to_datetime(frame[column]).astype("datetime64[us]")
    frame["numeric_value"] = frame["numeric_value"].astype(np.float32)
    frame = frame.sort_values(["subject_id", "time"], na_position="first", kind="stable")
    frame.to_parquet(path / "ehr" / "data" / "0.parquet", index=False)
    pd.DataFrame({"code": frame["code"].unique()}).to_parquet(path / "ehr" / "metadata" / "codes.parquet")
    split = np.where(SUBJECTS <= 8, "train", "held_out")
    pd.DataFrame({"subject_id": SUBJECTS, "split": split}).to_parquet(
        path / "ehr" / "metadata" / "subject_splits.parquet"
    )
    if images:
        add_images(path / "ct")
    return Cohort.open(path)


def add_images(folder):
    """One 32 mm cube a subject: HU = 10 x subject in the lower half, air above."""
    (folder / "volumes").mkdir(parents=True)
    index = pd.DataFrame({"image_id": [f"{s:016x}" for s in SUBJECTS], "subject_id": SUBJECTS, "source_hash": "0"})
    for axis in "xyz":
        index[f"spacing_{axis}"], index[f"shape_{axis}"] = 1.0, 32
    index.to_parquet(folder / "index.parquet")
    for s, image in zip(SUBJECTS, index["image_id"], strict=True):
        hu = np.full((32, 32, 32), 10 * s, np.int16)
        hu[:, :, 16:] = -1000
        path = folder / "volumes" / f"{image}.npy"
        np.save(path, hu)
        facts = {"shape": [32, 32, 32], "bytes": path.stat().st_size, "affine": np.eye(4).tolist(), "source_hash": "0"}
        write_json(path.with_suffix(".json"), facts)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("cohort"), default_events())


def rows_at(hour, subjects=SUBJECTS):
    images = [f"{s:016x}" for s in subjects]
    return pd.DataFrame({"subject_id": subjects, "prediction_time": [at(hour)] * len(subjects), "image_id": images})


def test_counts_and_last_values_are_those_seen_by_then(cohort):
    table, state = features("ehr_counts", cohort, rows_at(10), TRAIN)
    counts = state.counts
    column = {code: i for i, code in enumerate(counts.codes)}
    assert set(counts.codes) == {"SEX//F", "LAB//A", "DX//COMMON"}
    assert counts.value_codes == ("LAB//A",)
    assert table.z[:, column["DX//COMMON"]] == pytest.approx(np.log1p(2))
    assert table.z[:, column["LAB//A"]] == pytest.approx(np.log1p(1))  # the second is not yet available
    assert table.z[:, 3] == pytest.approx(SUBJECTS)
    assert table.z[:, 4] == pytest.approx(50, abs=0.01)
    later, _ = features("ehr_counts", cohort, rows_at(20), TRAIN, state)
    assert later.z[:, 3] == pytest.approx(100 + SUBJECTS)


def test_nothing_after_the_prediction_time_changes_a_feature(tmp_path, cohort):
    changed = [
        (s, time, code if time is None or time <= at(10) else "DX//OTHER", value, available)
        for s, time, code, value, available in default_events()
    ]
    changed += [(s, at(11), "DX//COMMON", np.nan, at(11)) for s in SUBJECTS]
    other = make_cohort(tmp_path / "c", changed, images=False)
    before, _ = features("ehr_counts", cohort, rows_at(10), TRAIN)
    after, _ = features("ehr_counts", other, rows_at(10), TRAIN)
    assert before.z.tobytes() == after.z.tobytes()


def test_the_vocabulary_knows_training_subjects_only_and_never_death(cohort):
    state = features("ehr_counts", cohort, rows_at(100), TRAIN)[1]
    assert "DX//ONLY_OUTSIDE_TRAIN" not in state.counts.codes
    assert "MEDS_DEATH" not in state.counts.codes
    assert "DX//FUTURE" in state.counts.codes
    without = fit_counts(cohort.events(), rows_at(100, TRAIN), excluded=("DX",))
    assert not [code for code in without.codes if code.startswith("DX")]


def test_a_fitted_state_is_reused_unchanged_on_a_site_with_other_codes(tmp_path, cohort):
    table, state = features("ehr_counts", cohort, rows_at(10), TRAIN)
    bare = [(s, at(1), "DX//NEW", 5.0, at(1)) for s in SUBJECTS]
    outside = make_cohort(tmp_path / "o", bare, images=False)
    there, same = features("ehr_counts", outside, rows_at(10), np.array([]), state)
    assert same is state
    assert there.z.shape[1] == table.z.shape[1]
    assert (there.z[:, :3] == 0).all()
    assert there.z[:, 3] == pytest.approx(np.median(TRAIN))  # no value there: the training median
    assert there.z[:, 4] == pytest.approx(50, abs=0.01)


def test_image_features_are_block_means_and_shares(cohort):
    table, state = features("image", cohort, rows_at(10), TRAIN)
    assert table.z.shape == (12, 512 + 2 + 7 + 7)
    pooled = table.z[:, :512].reshape(12, 8, 8, 8)
    assert pooled[:, :, :, 4:] == pytest.approx(-1000)
    assert pooled[:, 0, 0, 0] == pytest.approx(10.0 * SUBJECTS)
    assert table.z[:, -7:].sum(axis=1) == pytest.approx(1)
    assert table.z[:, -7] == pytest.approx(0.5)
    assert state.counts is None


def test_early_fusion_is_both_side_by_side_in_the_order_of_the_rows(cohort):
    order = rows_at(10).sample(frac=1, random_state=0)
    both, _ = features("early_fusion", cohort, order, TRAIN)
    image, _ = features("image", cohort, order, TRAIN)
    ehr, _ = features("ehr_counts", cohort, order, TRAIN)
    assert (both.z == np.concatenate([image.z, ehr.z], axis=1)).all()
    assert (both.subject_id == order["subject_id"]).all()
    assert set(both.split[both.subject_id > 8]) == {"held_out"}


def test_rows_without_an_image_are_left_out_of_image_features_and_never_filled(cohort):
    rows = rows_at(10)
    rows.loc[3, "image_id"] = None
    assert len(features("image", cohort, rows, TRAIN)[0]) == 11
    assert len(features("ehr_counts", cohort, rows, TRAIN)[0]) == 12


def test_bad_requests_are_refused(cohort):
    cases = [
        (("imagine", cohort, rows_at(10), TRAIN), "BASELINE_UNKNOWN"),
        (("image", cohort, rows_at(10), TRAIN, FeatureState("ehr_counts")), "BASELINE_STATE"),
        (("image", cohort, rows_at(10).drop(columns="image_id"), TRAIN), "BASELINE_EMPTY"),
        (("ehr_counts", cohort, rows_at(10), np.array([999])), "BASELINE_EMPTY"),
        (("ehr_counts", cohort, rows_at(10), TRAIN[:3]), "BASELINE_EMPTY"),
    ]
    for arguments, code in cases:
        with pytest.raises(Refusal) as caught:
            features(*arguments)
        assert caught.value.code == code
    assert set(BASELINES) == {"image", "ehr_counts", "early_fusion"}
