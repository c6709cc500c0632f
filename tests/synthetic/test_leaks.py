"""Deliberate leaks: each plants its one fault and nothing else, and the check of the audit that is due finds it."""

import hashlib
import re
from functools import partial
from pathlib import Path

import meds
import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import synthetic
from mmjepa.audit import audit
from mmjepa.ingest import ingest
from mmjepa.refusal import Refusal
from synthetic import ct, leaks, source

PATIENTS, AUDITED = 60, 150
DAY, YEAR = pd.Timedelta(days=1), pd.Timedelta(days=365)
KEY = ["subject_id", "visit_id", "code", "time"]
# the part of the audit that finds it, and its verdict
CAUGHT = {
    "discharge_codes_early": ("6b", "fail"),
    "died_code_in_window": ("7c", "fail"),
    "outcome_filtered": ("11", "fail"),
    "subject_label_under_prefixes": ("4e", "fail"),
    "events_after_death": ("8", "fail"),
    "subject_in_two_splits": ("1", "fail"),
    "near_duplicates": ("1c", "fail"),
    "fit_on_all_splits": ("14", "fail"),
    "record_length": ("10", "warn"),
    "order_tells": ("12", "fail"),
    "lab_at_order_time": ("13", "fail"),
    "window_opens_early": ("4d", "fail"),
    "later_crop": ("13d", "fail"),
}
# where each leak may leave a trace, beside the note in truth/world.json
TOUCHES = {
    "discharge_codes_early": {"data"},
    "died_code_in_window": {"data", "codes"},
    "outcome_filtered": {"labels"},
    "subject_label_under_prefixes": {"labels"},
    "events_after_death": {"data", "codes"},
    "subject_in_two_splits": {"data", "splits"},
    "near_duplicates": {"data", "splits", "labels"},
    "fit_on_all_splits": {"codes"},
    "record_length": {"data"},
    "order_tells": {"data", "splits", "labels", "identity", "oracle", "latents"},
    "lab_at_order_time": {"data"},
    "window_opens_early": {"labels"},
    "later_crop": {"labels", "images", "oracle", "latents"},
}


def drawn(row: dict, seed: int, subject: int, scan: int, size: int) -> np.ndarray:
    """Not a CT: voxels that hold every parameter of one."""
    text = repr((sorted(row.items()), seed, subject, scan))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int16).reshape(4, 2, 2)


def planted(folder: Path, *leak: str, put: tuple | None = None, **kind) -> Path:
    """A source folder with leaks; put: (module, name, stand-in) for as long as it is made."""
    with pytest.MonkeyPatch.context() as patch:
        if put:
            patch.setattr(*put)
        synthetic.generate(folder, **{"patients": PATIENTS, "leak": leak, "scans": 1} | kind)
    return folder


CHEAP, NONE = (ct, "render", drawn), (source, "_write_image", lambda *_: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Source folders by their leak (None: clean) and number of scans, made once each."""
    folders: dict[tuple, Path] = {}

    def get(leak: str | None = None, scans: int = 1) -> Path:
        key = leak, 2 if leak == "later_crop" else scans
        if key not in folders:
            names = [leak] if leak else []
            folders[key] = planted(tmp_path_factory.mktemp("leaks") / "source", *names, put=CHEAP, scans=key[1])
        return folders[key]

    return get


def part_of(path: Path) -> str:
    known = {"codes.parquet": "codes", "subject_splits.parquet": "splits", "oracle.parquet": "oracle"}
    known |= {"latents.parquet": "latents", "world.json": "world", "dataset.json": "dataset"}
    if path.parts[:2] == ("ehr", "data"):
        return "data"
    return known.get(path.name, path.parts[0])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(folder: Path) -> pd.DataFrame:
    files = sorted((folder / "ehr" / "data").rglob("*.parquet"))
    return pd.concat([pd.read_parquet(path).assign(split=path.parent.name) for path in files], ignore_index=True)


def labels(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "labels" / source.TASK / "0.parquet")


def splits(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "ehr" / meds.subject_splits_filepath)


def sick(folder: Path) -> set[int]:
    table = labels(folder)
    return set(table["subject_id"][table["boolean_value"]])


def same(a: pd.DataFrame, b: pd.DataFrame, by: list[str] = KEY) -> None:
    """The same rows, in whatever order."""
    pd.testing.assert_frame_equal(*(x.sort_values(by, kind="stable", ignore_index=True) for x in (a, b)))


def differing(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, pd.Series]:
    """Columns that differ -> the rows where they do; a and b: rows in one order."""
    changed = {name: (a[name] != b[name]) & ~(a[name].isna() & b[name].isna()) for name in a}
    return {name: hit for name, hit in changed.items() if hit.any()}


def test_every_switch_names_its_check_and_is_caught():
    assert set(leaks.SWITCHES) == set(CAUGHT) == set(TOUCHES)
    for name, (part, _) in CAUGHT.items():
        assert re.sub(r"\D", "", part) == leaks.SWITCHES[name].check
    lines = leaks.table().splitlines()
    assert [line.split()[:2] for line in lines] == [[name, s.check] for name, s in leaks.SWITCHES.items()]
    assert all(line.endswith(s.says) for line, s in zip(lines, leaks.SWITCHES.values(), strict=True))


@pytest.mark.parametrize("leak", leaks.SWITCHES)
def test_a_leak_leaves_every_file_that_it_does_not_concern_as_it_was(leak, made):
    scans = 2 if leak == "later_crop" else 1
    clean, dirty = contents(made(scans=scans)), contents(made(leak))
    changed = {part_of(path) for path in clean.keys() | dirty.keys() if clean.get(path) != dirty.get(path)}
    assert changed == TOUCHES[leak] | {"world"}


@pytest.mark.parametrize("leak", leaks.SWITCHES)
def test_what_is_written_is_still_meds(leak, made):
    root = made(leak) / "ehr"
    listed = pq.read_table(root / meds.code_metadata_filepath)
    meds.CodeMetadataSchema.validate(listed)
    meds.SubjectSplitSchema.validate(pq.read_table(root / meds.subject_splits_filepath))
    for path in (root / "data").rglob("*.parquet"):
        meds.DataSchema.validate(pq.read_table(path))
        rows = pd.read_parquet(path)
        assert set(rows["code"]) <= set(listed["code"].to_pylist())
        assert rows.groupby("subject_id")["time"].agg(lambda t: t.dropna().is_monotonic_increasing).all()
        assert (rows["subject_id"].diff() != 0).sum() == rows["subject_id"].nunique()
    meds.LabelSchema.validate(pq.read_table(made(leak) / "labels" / source.TASK / "0.parquet"))


def test_early_discharge_codes_move_to_the_admission_and_nothing_else_moves(made):
    by = ["subject_id", "visit_id", "code", "numeric_value"]
    before, after = (records(made(x)).sort_values(by, ignore_index=True) for x in (None, "discharge_codes_early"))
    hit = after["code"].str.startswith("DIAGNOSIS") & after["visit_id"].notna()
    pd.testing.assert_frame_equal(before[~hit], after[~hit])
    assert set(differing(before, after)) == {"time", "available_time"}
    admitted = after[after["code"] == "HOSPITAL_ADMISSION//VISIT"].set_index("visit_id")["time"]
    assert hit.sum() > 5 * PATIENTS
    assert (after["time"][hit] == after["visit_id"][hit].map(admitted)).all()
    assert (after["available_time"][hit] == after["time"][hit]).all()


def test_half_of_the_positives_died_at_the_end_of_their_last_visit(made):
    before, after = records(made()), records(made("died_code_in_window"))
    changed = differing(before, after)
    assert set(changed) == {"code"}
    hit = after[changed["code"]]
    assert set(before["code"][changed["code"]]) == {"HOSPITAL_DISCHARGE//HOME"}
    assert set(hit["code"]) == {"HOSPITAL_DISCHARGE//DIED"}
    last = after[after["code"].str.startswith("HOSPITAL_DISCHARGE")].groupby("subject_id")["time"].max()
    assert (hit.set_index("subject_id")["time"] == last[hit["subject_id"]]).all()
    assert set(hit["subject_id"]) < sick(made())
    assert len(hit) == pytest.approx(len(sick(made())) / 2, abs=6)


def test_filtered_negatives_are_those_without_a_visit_in_the_last_year(made):
    before, after = labels(made()), labels(made("outcome_filtered"))
    visits = records(made()).query("code == 'HOSPITAL_ADMISSION//VISIT'").groupby("subject_id")["time"].max()
    recent = before["prediction_time"] - before["subject_id"].map(visits) <= YEAR
    assert (recent & ~before["boolean_value"]).any()
    pd.testing.assert_frame_equal(after, before[before["boolean_value"] | ~recent].reset_index(drop=True))


def test_the_final_label_stands_at_earlier_times_and_at_the_diagnosis(made):
    before, after = labels(made()), labels(made("subject_label_under_prefixes"))
    rows = records(made())
    assert (after.groupby("subject_id")["boolean_value"].nunique() == 1).all()
    assert len(before.merge(after)) == len(before)
    last = after.groupby("subject_id")["prediction_time"].max()
    found = rows[rows["code"] == "DIAGNOSIS//LUNG_CANCER"].set_index("subject_id")["time"]
    honest = before.set_index("subject_id")["prediction_time"]
    pd.testing.assert_series_equal(last, found.combine_first(honest), check_names=False)
    ends = rows[rows["code"] == "HOSPITAL_DISCHARGE//HOME"].groupby("subject_id")["time"].nlargest(3).droplevel(1)
    earlier = after[after["prediction_time"] < after["subject_id"].map(honest)]
    expected = {(who, t + DAY) for who, t in ends.items()}
    assert set(earlier[["subject_id", "prediction_time"]].itertuples(index=False, name=None)) == expected


def test_labs_follow_the_death_of_a_tenth_and_nothing_of_theirs_is_lost(made):
    before, after = records(made()), records(made("events_after_death"))
    dead = after[after["code"] == "MEDS_DEATH"].set_index("subject_id")["time"]
    assert 0 < len(dead) < 0.25 * PATIENTS
    late = (after["time"] >= after["subject_id"].map(dead)).to_numpy()
    same(after[~late], before)
    assert (before["available_time"] < before["subject_id"].map(dead))[before["subject_id"].isin(dead.index)].sum() > 0
    labs = after[late & (after["code"] != "MEDS_DEATH")]
    assert labs["code"].str.startswith("LAB//").all()
    assert labs["numeric_value"].notna().all()
    assert set(labs["subject_id"]) == set(dead.index)
    gap = labs["time"] - labs["subject_id"].map(dead)
    assert gap.between(pd.Timedelta(hours=1), pd.Timedelta(hours=15)).all()
    assert (dead > labels(made()).set_index("subject_id")["prediction_time"][dead.index]).all()


def test_a_tenth_of_the_subjects_stand_whole_in_two_splits(made):
    before, after = splits(made()), splits(made("subject_in_two_splits"))
    twice = after["subject_id"][after["subject_id"].duplicated()]
    assert 0 < len(twice) < 0.25 * PATIENTS
    pd.testing.assert_frame_equal(after.iloc[:PATIENTS], before)
    sides = after[after["subject_id"].isin(twice)].groupby("subject_id")["split"].agg(set)
    assert all(len(side) == 2 and "train" in side for side in sides)
    rows = records(made("subject_in_two_splits")).merge(before.rename(columns={"split": "own"}))
    copies = rows[rows["split"] != rows["own"]]
    same(rows[rows["split"] == rows["own"]].drop(columns="own"), records(made()))
    own = records(made())
    same(copies.drop(columns=["own", "split"]), own[own["subject_id"].isin(twice)].drop(columns="split"))


def test_twins_are_a_record_and_label_again_under_another_number_and_date_in_another_split(made):
    clean, dirty = made(), made("near_duplicates")
    own = set(splits(clean)["subject_id"])
    for table, by in ((records, KEY), (labels, ["subject_id"]), (splits, ["subject_id"])):
        rows = table(dirty)
        same(rows[rows["subject_id"].isin(own)], table(clean), by)
    twins = records(dirty).query("subject_id not in @own")
    ids = twins["subject_id"] - leaks._TWIN_NUMBERS
    assert 0 < ids.nunique() < 0.25 * PATIENTS
    originals = records(clean)
    originals = originals[originals["subject_id"].isin(ids)]
    own_split = ids.map(splits(clean).set_index("subject_id")["split"])
    assert (twins["split"] != own_split).all()
    assert ((twins["split"] == "train") | (own_split == "train")).all()
    assert twins["image_id"].isna().all()
    order = ["subject_id", "visit_id", "code", "time"]
    twins, originals = (x.sort_values(order, ignore_index=True) for x in (twins, originals))
    pd.testing.assert_frame_equal(twins[["code", "numeric_value"]], originals[["code", "numeric_value"]])
    shift = (twins["time"] - originals["time"]).groupby(twins["subject_id"]).agg(["min", "max"])
    assert (shift["min"] == shift["max"]).all()
    assert shift["min"].between(30 * DAY, YEAR).all()
    assert ((twins["available_time"] - originals["available_time"]).dropna() >= 30 * DAY).all()
    asked = labels(dirty).set_index("subject_id")
    for twin, days in shift["min"].items():
        own_label = asked.loc[twin - leaks._TWIN_NUMBERS]
        assert asked.loc[twin, "prediction_time"] == own_label["prediction_time"] + days
        assert asked.loc[twin, "boolean_value"] == own_label["boolean_value"]


def test_statistics_of_the_codes_are_those_of_all_splits_and_not_of_train(made):
    before, after = (
        pd.read_parquet(made(x) / "ehr" / meds.code_metadata_filepath) for x in (None, "fit_on_all_splits")
    )
    pd.testing.assert_frame_equal(after[before.columns], before)
    rows = records(made()).astype({"numeric_value": float})
    of_all, of_train = (
        part.groupby("code")["numeric_value"].agg(["count", "mean", partial(pd.Series.std, ddof=0)])
        for part in (rows, rows[rows["split"] == "train"])
    )
    fitted = after.set_index("code")[["value_count", "value_mean", "value_sd"]].loc[of_all.index]
    np.testing.assert_allclose(fitted, of_all, rtol=1e-7)
    labs = of_train.index[of_train["mean"].notna()]
    assert not np.isclose(fitted.loc[labs, "value_mean"], of_train.loc[labs, "mean"], rtol=1e-4).all()


def test_negatives_lose_the_visits_that_began_two_years_before_and_positives_none(made):
    before, after = records(made()), records(made("record_length"))
    asked = before["subject_id"].map(labels(made()).set_index("subject_id")["prediction_time"])
    began = before["visit_id"].map(before.groupby("visit_id")["time"].min())
    old = (began < asked - pd.Timedelta(days=730)) & ~before["subject_id"].isin(sick(made()))
    assert old.any()
    pd.testing.assert_frame_equal(after, before[~old].reset_index(drop=True))


def test_positives_have_the_smaller_numbers_and_nothing_else_differs(made):
    clean, dirty = made(), made("order_tells")
    asked = labels(dirty)
    assert asked["subject_id"][asked["boolean_value"]].max() < asked["subject_id"][~asked["boolean_value"]].min()
    people = pd.read_csv(dirty / "identity" / "crosswalk.csv")
    old = people["subject_id"].to_numpy()
    new = pd.read_csv(clean / "identity" / "crosswalk.csv").set_index("patient_id")["subject_id"][people["patient_id"]]
    renamed = pd.Series(new.to_numpy(), index=old)
    rows = records(dirty)
    rows["visit_id"] += (rows["subject_id"].map(renamed) - rows["subject_id"]) * 1000
    same(rows.assign(subject_id=rows["subject_id"].map(renamed)), records(clean))
    truth = [
        lambda folder, name=name: pd.read_parquet(folder / "truth" / name)
        for name in ("oracle.parquet", "latents.parquet")
    ]
    for table in (labels, splits, *truth):
        found = table(dirty)
        pd.testing.assert_frame_equal(found.assign(subject_id=found["subject_id"].map(renamed)), table(clean))


def test_labs_can_be_read_before_they_are_drawn_and_nothing_else_is_early(made):
    before, after = records(made()), records(made("lab_at_order_time"))
    changed = differing(before, after)
    lab = after["code"].str.startswith("LAB//")
    assert set(changed) == {"available_time"}
    assert (changed["available_time"] == lab).all()
    ahead = (after["time"] - after["available_time"])[lab]
    assert ahead.between(pd.Timedelta(minutes=10), pd.Timedelta(hours=4)).all()


def test_prediction_times_lie_half_a_year_into_the_window_past_some_diagnoses(made):
    before, after = labels(made()), labels(made("window_opens_early"))
    pd.testing.assert_frame_equal(after.assign(prediction_time=after["prediction_time"] - 182 * DAY), before)
    found = records(made()).query("code == 'DIAGNOSIS//LUNG_CANCER'").set_index("subject_id")["available_time"]
    seen = found <= after.set_index("subject_id")["prediction_time"][found.index]
    assert 0.2 < seen.mean() < 0.8


def test_a_later_crop_moves_the_first_patch_by_half_the_growth_and_the_label_to_its_scan(made):
    clean, dirty = made(scans=2), made("later_crop")
    before, after = (pd.read_parquet(folder / "truth" / "latents.parquet") for folder in (clean, dirty))
    assert set(differing(before, after)) == {"ct_offset_x_mm"}
    growth_mm = (before["ct_diameter_mm_1"] - before["ct_diameter_mm"]) / 2
    np.testing.assert_allclose(before["ct_offset_x_mm"] - after["ct_offset_x_mm"], growth_mm, atol=1e-12)
    listing = pd.read_csv(clean / "images" / "images.csv")
    listing["first"] = listing["time"] == listing.groupby("patient_id")["time"].transform("min")
    for name, first in zip(listing["file"], listing["first"], strict=True):
        voxels = [np.asarray(nibabel.load(folder / "images" / name).dataobj) for folder in (clean, dirty)]
        assert np.array_equal(*voxels) is not bool(first)
    pd.testing.assert_frame_equal(labels(dirty), labels(made()))  # one scan alone has the label at it
    oracle = [(folder / "truth" / "oracle.parquet").read_bytes() for folder in (dirty, made())]
    assert oracle[0] == oracle[1]
    with pytest.raises(Refusal, match="SYNTHETIC_RANGE"):
        leaks.check(["later_crop"], 1)


def test_all_leaks_together_depend_on_no_worker_or_chunk(tmp_path, monkeypatch):
    kind = {"patients": 7, "scans": 2}
    planted(tmp_path / "a", *leaks.SWITCHES, **kind, workers=2)
    monkeypatch.setattr(source, "CHUNK", 3)
    planted(tmp_path / "b", *leaks.SWITCHES, **kind)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_who_is_hit_depends_on_no_shard_and_on_no_other_leak(made, tmp_path, monkeypatch):
    several = ["near_duplicates", "subject_in_two_splits", "events_after_death", "subject_label_under_prefixes"]
    large = planted(tmp_path / "large", *several, put=NONE)
    monkeypatch.setattr(source, "SHARD", 20)
    small = planted(tmp_path / "small", *several, put=NONE)
    same(records(small), records(large), [*KEY, "split"])
    same(labels(small), labels(large), ["subject_id", "prediction_time"])
    same(splits(small), splits(large), ["subject_id", "split"])
    for name, fact in (
        ("near_duplicates", "subject_id > 15_000_000"),
        ("events_after_death", "code == 'MEDS_DEATH' and subject_id < 15_000_000"),
    ):
        together, alone = (set(records(folder).query(fact)["subject_id"]) for folder in (large, made(name)))
        assert together == alone


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """Findings by part of the audit, of a cohort made under a seed and a leak (None: clean); without images."""
    results: dict[tuple, dict[str, dict]] = {}

    def get(seed: int, leak: str | None = None) -> dict[str, dict]:
        if (seed, leak) not in results:
            folder = tmp_path_factory.mktemp("audited")
            made = planted(folder / "source", *([leak] if leak else []), put=NONE, patients=AUDITED, seed=seed)
            if leak != "subject_in_two_splits":
                ingest(None, folder / "cohort", ehr=made)
                made = folder / "cohort"
            results[seed, leak] = {finding["check"]: finding for finding in audit(made)["findings"]}
        return results[seed, leak]

    return get


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("leak", sorted(CAUGHT.keys() - {"later_crop", "record_length"}))
def test_the_due_check_fires_on_the_leak_and_is_silent_on_the_clean_cohort(leak, seed, audited):
    part, verdict = CAUGHT[leak]
    assert audited(seed, leak)[part]["verdict"] == verdict
    assert audited(seed)[part]["verdict"] in ("pass", "not-applicable")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_clean_cohort_fails_no_check(seed, audited):
    assert not [finding for finding in audited(seed).values() if finding["verdict"] == "fail"]


@pytest.mark.parametrize("seed", [0, 1])
def test_record_length_tied_to_the_label_predicts_it_far_better_than_honest_lengths_do(seed, audited):
    """Honest lengths tell a little, so that the check may warn of a clean cohort too: the size of the AUROC tells."""
    finding = audited(seed, "record_length")["10"]
    assert finding["verdict"] == "warn"
    leaked, honest = (float(found["sentence"].split()[-1]) for found in (finding, audited(seed)["10"]))
    assert leaked > 0.85
    assert leaked > honest + 0.15


@pytest.mark.parametrize(("leak", "verdict"), [(None, "pass"), ("later_crop", "fail")])
def test_a_crop_placed_by_a_later_image_is_seen_in_the_pixels(leak, verdict, tmp_path):
    ingest(planted(tmp_path / "source", *([leak] if leak else []), patients=80, scans=2), tmp_path / "cohort")
    found = {finding["check"]: finding["verdict"] for finding in audit(tmp_path / "cohort")["findings"]}
    assert found["13d"] == verdict
    assert [check for check, word in found.items() if word == "fail"] == ["13d"] * (leak is not None)


def test_ingest_refuses_a_subject_in_two_splits(made, tmp_path):
    with pytest.raises(Refusal, match=r"MEDS_SCHEMA.*twice"):
        ingest(None, tmp_path / "cohort", ehr=made("subject_in_two_splits"))
