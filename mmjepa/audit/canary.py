"""Checks 2 and 3 of a trained run, from outside: embed the cohort, change what comes after t, embed again, compare.

Nothing is assumed of the run but that it turns a cohort folder into an embedding table. Each subject is asked at one of its
table's times. Batches hold other rows than those compared, so that z may differ by rounding: differences below 1e-4 of its size
are none.
"""

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmjepa.audit.events import DEATH, DIED
from mmjepa.audit.finding import Finding, judge, not_applicable
from mmjepa.audit.model import TOLERANCE
from mmjepa.cohort import Cohort
from mmjepa.files import atomic_path
from mmjepa.keyed import generator

Table = Callable[[Path], pd.DataFrame]
# rows that say when a stay, a life or an image is, by which a run may choose the times that it embeds: they stay as they are
FRAME = re.compile(
    r"(((HOSPITAL|ICU|ED)_)?(ADMISSION|DISCHARGE)|TRANSFER(_TO)?|ED_(REGISTRATION|OUT)|MEDS_BIRTH|MEDS_DEATH|CT)(//|$)"
)
KEPT = "rows of stays, transfers, birth and images were kept, save deaths after t (those in an ICU_DISCHARGE were kept)"
MAX_SUBJECTS = 200
ADVICE = "Cut the input by available_time <= t before the model sees it"


def table_of_run(run: Path | str) -> Table:
    """What ``mmjepa embed`` makes of a cohort: columns subject_id, prediction_time, z (float32 arrays)."""

    def table(cohort: Path) -> pd.DataFrame:
        from mmjepa.embed import embed

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "z.parquet"
            embed(run, cohort, out)
            return pd.read_parquet(out, columns=["subject_id", "prediction_time", "z"])

    return table


def canaries(table_of: Table, cohort: Cohort, labels: pd.DataFrame | None = None) -> list[Finding]:
    """Check 2, prefix invariance, and check 3, future swap, of the function cohort folder -> embedding table.

    labels: one task's subject_id and value; swapped are futures of subjects whose values differ, all subjects when None.
    """
    with tempfile.TemporaryDirectory() as place:
        some = Copy(cohort, Path(place) / "as_it_is", _chosen(cohort))
        some.write(some.records)
        before = _asked(table_of(some.folder))
        some.asked = before["prediction_time"]
        z = {"as_it_is": before["z"]}
        changed = {"randomised": some.randomised, "deleted": some.deleted, "swapped": partial(some.swapped, labels)}
        for how, change in changed.items():
            altered = some.beside(Path(place) / how)
            altered.write(change())
            after = table_of(altered.folder).set_index(["subject_id", "prediction_time"])["z"]
            wanted = pd.MultiIndex.from_arrays([before.index, before["prediction_time"]])
            z[how] = pd.Series(after.reindex(wanted).to_numpy(), index=before.index)
    moved = {how: _moved(z["as_it_is"], z[how], some.touched[how]) for how in some.touched}
    return [_invariance(moved, some), _swap(moved, some)]


def _invariance(moved: dict[str, int], some: "Copy") -> Finding:
    name, tried = "prefix invariance", len(some.touched["deleted"])
    if not tried:
        return not_applicable("2", name, "no record has events after the time it is embedded at")
    sentence = f"of {tried} records, z moved or was not finite for {moved['randomised']} when the future was randomised and {moved['deleted']} when it was deleted; {KEPT}"
    return judge("2", name, moved["randomised"] + moved["deleted"], sentence, ADVICE)


def _swap(moved: dict[str, int], some: "Copy") -> Finding:
    name, tried = "future swap", len(some.touched["swapped"])
    if not tried:
        return not_applicable("3", name, "no two records with different labels have a future to swap")
    sentence = f"of {tried} records given the future of a subject with another label, z moved or was not finite for {moved['swapped']}; {KEPT}"
    return judge("3", name, moved["swapped"], sentence, ADVICE)


class Copy:
    """Some subjects' records in a cohort folder of their own, images linked.

    records: MEDS rows of the timed and static events. asked: subject_id -> t. touched: change -> subjects whose future it changed.
    """

    def __init__(self, cohort: Cohort, folder: Path, subjects: np.ndarray) -> None:
        self.cohort, self.folder, self.subjects = cohort, folder, subjects
        files = sorted((cohort.meds_root / "data").rglob("*.parquet"))
        wanted = [("subject_id", "in", subjects.tolist())]
        self.schema = pq.read_schema(files[0])
        self.records = pa.concat_tables([pq.read_table(path, filters=wanted) for path in files]).to_pandas()
        self.asked = pd.Series(dtype="datetime64[us]")
        self.touched: dict[str, set[int]] = {}

    def beside(self, folder: Path) -> "Copy":
        """The same subjects for another folder."""
        other = object.__new__(Copy)
        other.__dict__ = self.__dict__ | {"folder": folder}
        return other

    def write(self, records: pd.DataFrame) -> None:
        """Write the cohort folder with these records."""
        root = self.cohort.meds_root
        (self.folder / "ehr" / "data").mkdir(parents=True)
        (self.folder / "ehr" / "metadata").symlink_to((root / "metadata").resolve())
        ordered = records.sort_values(["subject_id", "time"], kind="stable", na_position="first")
        table = pa.Table.from_pandas(ordered, schema=self.schema, preserve_index=False)
        pq.write_table(table, self.folder / "ehr" / "data" / "0.parquet")
        if self.cohort.has_images:
            (self.folder / "ct").mkdir()
            (self.folder / "ct" / "volumes").symlink_to((self.cohort.ct_folder / "volumes").resolve())
            (self.folder / "ct" / "manifest.json").symlink_to((self.cohort.ct_folder / "manifest.json").resolve())
            index = pd.read_parquet(self.cohort.ct_folder / "index.parquet")
            with atomic_path(self.folder / "ct" / "index.parquet") as temporary:
                index[index["subject_id"].isin(self.subjects)].to_parquet(temporary)

    def randomised(self) -> pd.DataFrame:
        """The future's codes and values drawn anew from all rows, values scaled; times stay."""
        changed, late = self.records.copy(), self._late("randomised")
        pool = self.records[~self._marked(_frames) & self.records["time"].notna()]
        draw = generator(0, "audit/canary", len(pool))
        source = draw.integers(len(pool), size=int(late.sum()))
        changed.loc[late, "code"] = pool["code"].to_numpy()[source]
        values = pool["numeric_value"].to_numpy(float)[source] * draw.uniform(-2, 2, len(source))
        changed.loc[late, "numeric_value"] = values.astype(self.records["numeric_value"].dtype)
        return changed

    def deleted(self) -> pd.DataFrame:
        """Without the future."""
        return self.records[~self._late("deleted")]

    def swapped(self, labels: pd.DataFrame | None) -> pd.DataFrame:
        """Each subject's future in place of that of the next one with another label, moved to its time."""
        late = self._late("swapped")
        value = None if labels is None else labels.groupby("subject_id")["value"].first()
        having = sorted(self.touched["swapped"] & set(value.index if value is not None else self.touched["swapped"]))
        parts, given = [self.records[~late | ~self.records["subject_id"].isin(having)]], set()
        futures = dict(tuple(self.records[late].groupby("subject_id")))
        for k, subject in enumerate(having):
            others = [*having[k + 1 :], *having[:k]]
            other = next((o for o in others if value is None or value[o] != value[subject]), None)
            if other is None:
                parts.append(futures[subject])
                continue
            shift = self.asked[subject] - self.asked[other]
            times = [name for name in ("time", "available_time") if name in self.records]
            moved = futures[other].assign(subject_id=subject, **{name: futures[other][name] + shift for name in times})
            parts.append(moved)
            given.add(subject)
        self.touched["swapped"] = given
        return pd.concat(parts, ignore_index=True)

    def _marked(self, of_code: Callable[[str], bool]) -> pd.Series:
        """[rows] bool: rows of an image, and those with such a code."""
        told = self.records["code"].map({code: of_code(code) for code in self.records["code"].unique()}).astype(bool)
        return told | self.records["image_id"].notna() if "image_id" in self.records else told

    def _kept(self) -> pd.Series:
        """[rows] bool: the frame without deaths; a death known after t but dated before it ends what may be embedded."""
        dated_after = self.records["time"] > self.records["subject_id"].map(self.asked)
        return self._marked(_frames) & ~(self.records["code"].map(_tells_death).astype(bool) & dated_after)

    def _late(self, how: str) -> pd.Series:
        """[rows] bool: what becomes known after t and may be changed; remembers whose it is."""
        known = self.records["time"]
        if "available_time" in self.records:
            known = self.records["available_time"].fillna(known)
        late = (known > self.records["subject_id"].map(self.asked)) & ~self._kept()
        self.touched[how] = set(self.records.loc[late, "subject_id"])
        return late


def _frames(code: str) -> bool:
    return bool(FRAME.match(code))


def _tells_death(code: str) -> bool:
    """Of a frame's code; an ICU stay without its end is none, so that its discharge stays whatever it tells."""
    return bool(DEATH.match(code) or (DIED.search(code) and not code.startswith("ICU_")))


def _chosen(cohort: Cohort) -> np.ndarray:
    """Subjects by key; those with images where there are any."""
    subjects = np.asarray(cohort.events().subjects)
    if cohort.has_images:
        subjects = np.intersect1d(subjects, pd.read_parquet(cohort.ct_folder / "index.parquet")["subject_id"])
    return np.sort(generator(0, "audit/canary", len(subjects)).permutation(subjects)[:MAX_SUBJECTS])


def _asked(table: pd.DataFrame) -> pd.DataFrame:
    """One row of each subject, the middle one in time, by subject_id."""
    ordered = table.sort_values(["subject_id", "prediction_time"])
    place, size = ordered.groupby("subject_id").cumcount(), ordered.groupby("subject_id")["z"].transform("size")
    return ordered[place == (size - 1) // 2].set_index("subject_id")


def _moved(before: pd.Series, after: pd.Series, touched: set[int]) -> int:
    """Subjects whose z is another, gone, or not finite: NaN compares with nothing, so that it can prove nothing."""
    count = 0
    for subject in sorted(touched & set(before.index)):
        z, other = np.asarray(before[subject], float), after[subject]
        gone = other is None or np.ndim(other) == 0
        if gone or not np.isfinite(z).all() or not np.isfinite(other).all():
            count += 1
            continue
        count += bool(np.linalg.norm(z - np.asarray(other, float)) > TOLERANCE * max(np.linalg.norm(z), 1e-12))
    return count
