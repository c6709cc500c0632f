"""Daily text: one block a day with tagged lines (arXiv 2601.22128), cut at a prediction time, newest days first to stay.

<demographics>                      record  = demographics , { day } ;
Age: 67 y at day 0                  day     = NL "[" date "]" NL , block , { block } ;
GENDER//F                           block   = "<" tag ">" NL , line , { line } , "</" tag ">" NL ;
</demographics>                     line    = name NL | name " (" unit "): " value { ", " value } NL ;

[day 3]
<measurements>
LAB//220045 (bpm): 91.00, 88.00
</measurements>
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmjepa.config import build, to_plain
from mmjepa.ehr.daily_lines import TAGS, Section, family, largest, make_heads, split_unit
from mmjepa.ehr.saved import Form, load_form
from mmjepa.ehr.stays import DAY_US, YEAR_US
from mmjepa.ehr.store import EventStore
from mmjepa.refusal import Refusal

KIND, VERSION = "daily", 1
DIED = re.compile(r"\b(died|expired|dead|death|deceased)\b", re.IGNORECASE)
HEADER = len(TAGS)  # the place of codes that go into the header


def _default_tags() -> dict[str, tuple[str, ...]]:
    return {
        "demographics": ("PERSON", "GENDER", "SEX", "RACE", "ETHNICITY"),
        "conditions": ("DIAGNOSIS", "CONDITION", "CONDITION_OCCURRENCE", "DRG", "SNOMED", "ICD9CM", "ICD10CM"),
        "observations": (
            "OBSERVATION",
            "ED_REGISTRATION",
            "ED_OUT",
            "HOSPITAL_ADMISSION",
            "HOSPITAL_DISCHARGE",
            "ICU_ADMISSION",
            "ICU_DISCHARGE",
            "TRANSFER_TO",
            "VISIT_START",
            "VISIT_END",
        ),
        "measurements": (
            "MEASUREMENT",
            "LAB",
            "LOINC",
            "Blood Pressure",
            "BMI",
            "eGFR",
            "Height",
            "Weight",
            "SUBJECT_FLUID_OUTPUT",
            "SUBJECT_WEIGHT_AT_INFUSION",
        ),
        "procedures": ("PROCEDURE", "PROCEDURE_OCCURRENCE", "DEVICE_EXPOSURE", "HCPCS", "CPT4", "ICD10PCS", "ICD9Proc"),
        "drugs": ("DRUG_EXPOSURE", "MEDICATION", "INFUSION_START", "INFUSION_END", "RxNorm", "CVX"),
        "notes": ("NOTE",),
    }


@dataclass(frozen=True)
class DailyConfig:
    """style: ``smb_rel`` writes days since the first known event and an age, ``smb`` calendar dates and the birth date.

    tags: tag -> families of codes, by whole parts in any case (``LAB`` takes ``LAB//x``, ``LOINC`` takes ``LOINC/x``,
        ``Weight`` takes ``Weight (Lbs)``); of several the longest wins. Timed demographics go into the header.
    other: the tag of families that are named nowhere, so that nothing vanishes unseen.
    exclude: families that are never written; images have their own encoder. died_in: families left out where their code
        or description says that the subject died.
    units: families whose last of three or more parts is a unit.
    last_values: most recent values of a code and day that are written.
    timespans: (a, b): from a to b days before the prediction time, in place of days; the last one given is written first.
    delimiters: ``added`` wants the tags as tokens of their own, see ``DailyForm.added_tokens``.
    """

    style: Literal["smb_rel", "smb"] = "smb_rel"
    tags: dict[str, tuple[str, ...]] = field(default_factory=_default_tags)
    other: str = "observations"
    exclude: tuple[str, ...] = ("MEDS_DEATH", "DEATH", "CT")
    died_in: tuple[str, ...] = ("HOSPITAL_DISCHARGE", "ICU_DISCHARGE", "ED_OUT", "TRANSFER_TO", "VISIT_END", "DRG")
    units: tuple[str, ...] = ("LAB", "SUBJECT_FLUID_OUTPUT")
    birth: str = "MEDS_BIRTH"
    last_values: int = 5
    timespans: tuple[tuple[int, int], ...] = ()
    delimiters: Literal["text", "added"] = "text"

    def __post_init__(self) -> None:
        if not {*self.tags, self.other} <= {*TAGS, "demographics"} or self.other == "demographics":
            raise ValueError(f"tags are demographics, {', '.join(TAGS)}; other is one of them, not demographics")
        if self.last_values < 1 or any(start <= end or end < 0 for start, end in self.timespans):
            raise ValueError("last_values must be at least 1 and each timespan (a, b) have a > b >= 0")


@dataclass(frozen=True)
class _Codes:
    """What a store's codes are: place in TAGS (HEADER, or -1 = never written), ``Section.heads``, whether a birth."""

    place: np.ndarray
    heads: list[tuple[str, str]]
    birth: np.ndarray


@dataclass(frozen=True, eq=False)
class DailyForm(Form):
    """The fitted form. names: code -> (name, unit): a person's own map, then the descriptions of codes seen in training.

    A code that is not among them takes its description from the store at hand, else it is written as it is.
    """

    config: DailyConfig
    names: dict[str, tuple[str, str]] = field(repr=False)
    fitted_on: str
    _tables: dict[str, _Codes] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(
        cls,
        store: EventStore,
        subjects: Iterable[int],
        config: DailyConfig | None = None,
        names: Mapping[str, tuple[str, str]] | None = None,
    ) -> "DailyForm":
        """Keep the names of the codes that ``subjects`` have: pass training subjects only. names: see ``names.read_names``."""
        config, seen = config or DailyConfig(), np.zeros(len(store.vocabulary), bool)
        for row in store.rows(np.unique(np.fromiter(subjects, np.int64))).tolist():
            seen[store.codes[slice(*store.offsets[row : row + 2])]] = True
            seen[store.static_codes[slice(*store.static_offsets[row : row + 2])]] = True
        described = [
            code for code in (store.vocabulary[i] for i in np.flatnonzero(seen)) if store.descriptions.get(code)
        ]
        kept = {code: (store.descriptions[code], split_unit(code, config.units)[1]) for code in described}
        return cls(config, kept | dict(names or {}), store.fingerprint)

    def text(
        self,
        store: EventStore,
        subject_id: int,
        t_us: int,
        budget: int | None = None,
        count: Callable[[str], int] | None = None,
    ) -> str:
        """The record as known at ``t_us`` (int64 us, included), of at most ``budget`` tokens.

        count: tokens of a text, for instance ``lambda text: len(tokenizer.encode(text))``. Too long a text loses its oldest
        days whole; where the newest alone is too long, that day's oldest lines. The header always stays.
        Raises Refusal: SUBJECT_UNKNOWN, DAILY_BUDGET (the header and the newest line alone are longer).
        """
        if (budget is None) != (count is None):
            raise ValueError("a budget needs a count of tokens, and the other way round")
        header, sections = self._sections(store, subject_id, t_us)

        def newest(kept: int) -> str:
            texts = [section.text for section in sections[:kept]]
            return header + "".join(texts if self.config.timespans else reversed(texts))

        if budget is None or count is None:
            return newest(len(sections))
        kept = largest(len(sections), lambda kept: count(newest(kept)) <= budget)
        if kept:
            return newest(kept)
        text = header + (sections[0].cut(lambda lines: count(header + lines) <= budget) if sections else "")
        if count(text) > budget:
            raise Refusal(
                "DAILY_BUDGET", f"{budget} tokens cannot hold the header and the newest line", "Allow more tokens"
            )
        return text

    @property
    def added_tokens(self) -> list[str]:
        """Tokens to add to the tokenizer; none where the delimiters are plain text."""
        if self.config.delimiters == "text":
            return []
        return [mark for tag in ("demographics", *TAGS, "timespan") for mark in (f"<{tag}>", f"</{tag}>")]

    @classmethod
    def load(cls, path: Path | str, *, expected: str | None = None) -> "DailyForm":
        """Read the JSON. Raises the refusals of ``saved.load_form``."""
        content = load_form(path, KIND, VERSION, expected)
        names = {code: (name, unit) for code, (name, unit) in content["names"].items()}
        return cls(build(DailyConfig, content["config"]), names, content["fitted_on"])

    def _content(self) -> dict[str, Any]:
        names = {code: list(pair) for code, pair in self.names.items()}
        known = {"kind": KIND, "version": VERSION, "fitted_on": self.fitted_on}
        return known | {"config": to_plain(self.config), "names": names}

    def _sections(self, store: EventStore, subject_id: int, t_us: int) -> tuple[str, list[Section]]:
        """The header, and the days or timespans, newest first; their lines are written when asked for."""
        codes, row = self._codes(store), store.row(subject_id)
        (start,), (stop,) = store.as_of(np.array([subject_id]), np.array([t_us]))
        code, time = np.asarray(store.codes[start:stop]), np.asarray(store.times_us[start:stop])
        value, place = np.asarray(store.values[start:stop]), codes.place[code]
        dated = np.flatnonzero((place >= 0) & (place < HEADER))
        origin = int(time[dated[0]] // DAY_US) if len(dated) else None  # what was known first: it stays as t grows
        static = slice(int(store.static_offsets[row]), int(store.static_offsets[row + 1]))
        facts = np.append(store.static_codes[static], code[place == HEADER])
        facts_value = np.append(store.static_values[static], value[place == HEADER])
        births = time[codes.birth[code]]
        header = self._header(codes, facts, facts_value, int(births[0]) if len(births) else None, origin)
        if origin is None:
            return header, []
        rows = dated[np.argsort(time[dated], kind="stable")]
        spans = self._spans(time[rows], t_us, origin) if self.config.timespans else self._days(time[rows], origin)
        sections = []
        for title, low, high in spans:
            mine = rows[low:high]
            made = Section(title, place[mine], code[mine], value[mine], codes.heads, self.config.last_values)
            sections.append(made)
        return header, sections

    def _header(
        self, codes: _Codes, code: np.ndarray, value: np.ndarray, birth_us: int | None, origin: int | None
    ) -> str:
        lines = []
        if birth_us is not None and self.config.style == "smb":
            lines = [f"Birth: {np.datetime64(birth_us // DAY_US, 'D')}"]
        elif birth_us is not None and origin is not None:
            lines = [f"Age: {int((origin * DAY_US - birth_us) // YEAR_US)} y at day 0"]
        shown = np.flatnonzero(codes.place[code] >= 0)
        facts = Section("", np.zeros(len(shown)), code[shown], value[shown], codes.heads, self.config.last_values)
        return "\n".join(["<demographics>", *lines, *(line.text for line in facts.lines), "</demographics>\n"])

    def _days(self, time: np.ndarray, origin: int) -> list[tuple[str, int, int]]:
        """Title, first row and end of every day, newest first."""
        day = time // DAY_US
        first = np.flatnonzero(np.diff(day, prepend=day[0] - 1))
        titles = [f"\n[{self._date(int(day[at]), origin)}]\n" for at in first]
        return list(zip(titles, first.tolist(), [*first[1:].tolist(), len(day)], strict=True))[::-1]

    def _spans(self, time: np.ndarray, t_us: int, origin: int) -> list[tuple[str, int, int]]:
        """The same of every timespan that holds a row."""
        found = []
        for back, to in reversed(self.config.timespans):
            edges = t_us - back * DAY_US, t_us - to * DAY_US
            low, high = np.searchsorted(time, edges, side="right").tolist()
            if high > low:
                start, end = (self._date(edge // DAY_US, origin) for edge in edges)
                found.append((f"\n<timespan>{start} - {end}</timespan>\n", low, high))
        return found

    def _date(self, day: int, origin: int) -> str:
        return str(np.datetime64(day, "D")) if self.config.style == "smb" else f"day {day - origin}"

    def _codes(self, store: EventStore) -> _Codes:
        """What the store's codes are; made once a store."""
        if store.fingerprint not in self._tables:
            config, places = self.config, {tag: i for i, tag in enumerate((*TAGS, "demographics"))}
            tags = {name.lower(): places[tag] for tag, names in config.tags.items() for name in names}
            gone = {name.lower(): -1 for name in (*config.exclude, config.birth)}
            may_tell, birth = {name.lower(): 1 for name in config.died_in}, {config.birth.lower(): 1}
            place = np.full(len(store.vocabulary), places[config.other])
            for i, code in enumerate(store.vocabulary):
                said = f"{code} {store.descriptions.get(code) or ''}".replace("_", " ")
                if family(code, gone) or (family(code, may_tell) and DIED.search(said)):
                    place[i] = -1
                elif (tag := family(code, tags)) is not None:
                    place[i] = tag
            heads = [self._heads(code, store.descriptions) for code in store.vocabulary]
            births = np.array([bool(family(code, birth)) for code in store.vocabulary], bool)
            self._tables[store.fingerprint] = _Codes(place, heads, births)
        return self._tables[store.fingerprint]

    def _heads(self, code: str, descriptions: Mapping[str, str]) -> tuple[str, str]:
        bare, unit = split_unit(code, self.config.units)
        return make_heads(*(self.names.get(code) or (descriptions.get(code) or bare, unit)))
