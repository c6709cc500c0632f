"""The page: a dictionary of results in, one HTML file without any outside link out."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmjepa.files import atomic_path
from mmjepa.refusal import Refusal
from mmjepa.report import figures, words

KEYS = (
    "title",
    "question",
    "cohort",
    "results",
    "metrics",
    "collapse",
    "rollout",
    "audit",
    "limits",
    "config_yaml",
    "facts",
)
ORDER = ("fail", "warn", "pass", "not-applicable")


def write_report(results: Mapping[str, Any], out: Path | str) -> None:
    """Write one self-contained HTML page; a section appears only where its data are given. Everything is escaped.

    Keys of ``results`` (only the first is needed; all values plain, as JSON has them):

    - ``title``: text. ``question``: what was asked, one plain paragraph.
    - ``cohort``: ``{site: {step: count or text}}`` in the order of the flow, for instance subjects, CTs, refused, paired,
      train, tuning, held_out. ``limits``: list of sentences.
    - ``results``: what ``mmjepa.evaluate.judge.judge`` returns.
    - ``metrics``: rows of ``metrics.jsonl``: step, phase, loss and other terms.
    - ``collapse``: ``{name: panel}`` of ``mmjepa.evaluate.collapse.collapse_panel``.
    - ``rollout``: ``{"table": records, "summary": dict, "actions": text}`` of ``mmjepa.evaluate.rollout`` (actions: which
      future actions the model was told).
    - ``audit``: what ``mmjepa.audit.audit`` returns: verdict and findings.
    - ``config_yaml``: text. ``facts``: ``{name: value}`` of how it was made: version, commit, wall time, machine, threads.

    Raises Refusal ``REPORT_KEY`` for an unknown or missing key, ``OUTPUT_EXISTS``.
    """
    unknown = [key for key in results if key not in KEYS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], KEYS, n=1, cutoff=0.0)[0]
        raise Refusal("REPORT_KEY", f"a report has no part '{unknown[0]}'", f"The nearest known part is '{near}'")
    if "title" not in results:
        raise Refusal("REPORT_KEY", "a report needs a title")
    if Path(out).exists():
        raise Refusal("OUTPUT_EXISTS", f"{out} already exists", "Name another file")
    page = render(results)
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(results: Mapping[str, Any]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("mmjepa.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "value": words.value,
        "limits": words.limits,
        "number": _number,
        "collapse_verdict": words.collapse_verdict,
    }
    given = {key: results.get(key) for key in KEYS}
    # the two files of this package are the only text that is not escaped
    style = Markup(environment.get_template("page.css").render())
    return environment.get_template("page.html").render(**given, style=style, **_prepared(given))


def _prepared(given: Mapping[str, Any]) -> dict[str, Any]:
    """Figures and sentences that the page shows."""
    made: dict[str, Any] = {"reading": [], "drawn": {}, "steps": [], "findings": [], "hours": []}
    if given["results"]:
        judged = given["results"]
        oracles = [arm["name"] for arm in judged["arms"] if arm["oracle"]]
        made["reading"] = words.reading(judged) + words.collapse_reading(given["collapse"] or {})
        made["drawn"]["roc"] = figures.roc(judged["sites"], oracles)
        made["drawn"]["calibration"] = figures.calibration(judged["sites"], oracles)
    if given["metrics"]:
        made["drawn"]["losses"] = figures.losses(given["metrics"])
        made["phases"] = _phases(given["metrics"])
    if given["rollout"]:
        made["drawn"]["rollout"] = figures.rollout(given["rollout"]["table"])
        made["drift"] = words.drift_sentence(given["rollout"]["summary"])
        made["hours"] = _hours(given["rollout"]["table"])
    if given["audit"]:
        made["findings"] = sorted(given["audit"]["findings"], key=lambda finding: ORDER.index(finding["verdict"]))
    if given["cohort"]:
        made["steps"] = list(dict.fromkeys(step for flow in given["cohort"].values() for step in flow))
    made["drawn"] = {name: Markup(svg) for name, svg in made["drawn"].items()}
    return made


def _phases(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each phase once, in order: name, first and last step, first and last loss."""
    phases: list[dict[str, Any]] = []
    for row in rows:
        if not phases or phases[-1]["name"] != row["phase"]:
            phases.append({"name": row["phase"], "first_step": row["step"], "first_loss": row["loss"]})
        phases[-1] |= {"last_step": row["step"], "last_loss": row["loss"]}
    return phases


def _hours(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model's rows of the fixed cohort at a few hours."""
    rows = [row for row in table if row["cohort"] == "fixed" and row["forecast"] == "model"]
    wanted = {1, 6, 12, 24, 48, rows[-1]["h"]} if rows else set()
    return [row for row in rows if row["h"] in wanted]


def _number(value: Any) -> str:
    """Counts with separators, other numbers with a few digits, text as it is."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
