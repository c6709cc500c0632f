"""The hourly text as a fitted form: its settings and the names of the training split's codes, on disk with their hash."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmjepa.config import build, to_plain
from mmjepa.ehr.saved import Form, load_form
from mmjepa.ehr.store import EventStore
from mmjepa.ehr.text import HourlyTextConfig, TextWriter
from mmjepa.refusal import Refusal

KIND, VERSION = "hourly", 1


@dataclass(frozen=True, eq=False)
class HourlyForm(Form):
    """names: code -> (name, unit), of every code that a training subject has; another store's descriptions change none of
    them. Other codes are named by the store at hand. fitted_on: fingerprint of the store."""

    config: HourlyTextConfig
    names: dict[str, tuple[str, str]] = field(repr=False)
    fitted_on: str

    @classmethod
    def fit(
        cls,
        store: EventStore,
        subjects: Iterable[int],
        config: HourlyTextConfig | None = None,
        names: Mapping[str, tuple[str, str]] | None = None,
    ) -> "HourlyForm":
        """Keep the names of the codes that ``subjects`` have: pass training subjects only. names: see ``names.read_names``."""
        config, given, seen = config or HourlyTextConfig(), dict(names or {}), np.zeros(len(store.vocabulary), bool)
        for row in store.rows(np.unique(np.fromiter(subjects, np.int64))).tolist():
            seen[store.codes[slice(*store.offsets[row : row + 2])]] = True
            seen[store.static_codes[slice(*store.static_offsets[row : row + 2])]] = True
        writer = TextWriter(store, config, given)
        kept = {store.vocabulary[code]: writer.name_of(code) for code in np.flatnonzero(seen).tolist()}
        return cls(config, kept | given, store.fingerprint)

    def writer(self, store: EventStore) -> TextWriter:
        """Writes the texts of a store's stays in this form."""
        return TextWriter(store, self.config, self.names)

    @classmethod
    def load(cls, path: Path | str, *, expected: str | None = None) -> "HourlyForm":
        """Read the JSON; ``expected``: the hash that it must have. Raises the Refusals of ``saved.load_form``."""
        content = load_form(path, KIND, VERSION, expected)
        try:
            names = {code: (name, unit) for code, (name, unit) in content["names"].items()}
            return cls(build(HourlyTextConfig, content["config"]), names, content["fitted_on"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Refusal("FORM_BROKEN", f"{path} holds no hourly text form", "Fit the form again") from None

    def _content(self) -> dict[str, Any]:
        names = {code: list(pair) for code, pair in self.names.items()}
        return {
            "kind": KIND,
            "version": VERSION,
            "config": to_plain(self.config),
            "names": names,
            "fitted_on": self.fitted_on,
        }
