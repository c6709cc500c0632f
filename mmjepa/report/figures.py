"""Figures as inline SVG text, drawn without a display and the same bytes for the same numbers."""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# distinguishable with colour-blind eyes (Okabe-Ito); line styles repeat the message in black and white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#e69f00")
NOT_LOSSES = ("seconds", "skipped")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
LOOK = {
    "svg.fonttype": "path",
    "svg.hashsalt": "mmjepa",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def roc(sites: Mapping[str, Any], oracles: Sequence[str]) -> str:
    """ROC curves, one panel for each site."""

    def curve(axes: Axes, arm: Mapping[str, Any], **look: Any) -> None:
        points = arm["roc"]
        axes.plot(points["false_positive_rate"], points["true_positive_rate"], drawstyle="steps-post", **look)

    return _by_site(sites, oracles, curve, "coin toss", "share of negatives flagged", "share of positives found")


def calibration(sites: Mapping[str, Any], oracles: Sequence[str]) -> str:
    """Observed share against predicted risk in ten groups of equal size, one panel for each site."""

    def curve(axes: Axes, arm: Mapping[str, Any], **look: Any) -> None:
        groups = arm["calibration_groups"]
        x, y = [group["predicted"] for group in groups], [group["observed"] for group in groups]
        axes.plot(x, y, marker="o", markersize=2.5, **look)

    return _by_site(sites, oracles, curve, "perfect", "predicted risk", "observed share")


def _by_site(
    sites: Mapping[str, Any], oracles: Sequence[str], curve: Callable[..., None], diagonal: str, x: str, y: str
) -> str:
    """A curve of every arm over the unit square, one panel for each site; oracles black and dotted."""
    with rc_context(LOOK):
        figure, panels = _panels(len(sites), 3.9)
        for axes, (site, result) in zip(panels, sites.items(), strict=True):
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, label=diagonal)
            for i, (name, arm) in enumerate(result["arms"].items()):
                look = {"color": "black", "linestyle": ":"} if name in oracles else _style(i)
                curve(axes, arm, label=name, **look)
            axes.set(title=site, xlabel=x, ylabel=y, aspect="equal")
        panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure)


def losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every loss term over steps; the phases of training are separated by lines and named."""
    with rc_context(LOOK):
        figure, (axes,) = _panels(1, 7.2, 2.9)
        for i, name in enumerate(loss_terms(rows)):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6 if name == "loss" else 1.0, **_style(i))
        values = np.array([row[name] for name in loss_terms(rows) for row in rows if row.get(name) is not None])
        last, phases = None, 0
        for row in rows:
            if row.get("phase", last) != last:
                axes.axvline(row["step"], color="#999999", linewidth=0.8)
                phases += 1
                place = (row["step"], 1.01)
                axes.annotate(str(phases), place, xycoords=("data", "axes fraction"), fontsize=8, color="#444444")
                last = row["phase"]
        if len(values) and values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.set(xlabel="step (the numbers above count the phases)", ylabel="loss")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure)


def loss_terms(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the loss terms in metric rows, ``loss`` (what was minimised) first."""
    names = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    names = {name for name in names if name not in NOT_LOSSES and not name.startswith(("gradient", "latent"))}
    return sorted(names & {"loss"}) + sorted(names - {"loss"})


def rollout(rows: Sequence[Mapping[str, Any]]) -> str:
    """Error of each forecast by hours ahead with its interval, shrinking cohort left and fixed cohort right."""
    with rc_context(LOOK):
        cohorts = [name for name in ("shrinking", "fixed") if any(row["cohort"] == name for row in rows)]
        figure, panels = _panels(len(cohorts), 4.0, 3.0)
        for axes, cohort in zip(panels, cohorts, strict=True):
            for i, forecast in enumerate(dict.fromkeys(row["forecast"] for row in rows)):
                points = [row for row in rows if row["cohort"] == cohort and row["forecast"] == forecast]
                h = [row["h"] for row in points]
                axes.plot(h, [row["D"] for row in points], label=forecast.replace("_", " "), **_style(i))
                low, high = [row["D_low"] for row in points], [row["D_high"] for row in points]
                axes.fill_between(h, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0)
            # linear extrapolation soon leaves the others so far below that they could not be told apart
            top = max(row["D"] for row in rows if row["cohort"] == cohort and row["forecast"] != "linear")
            axes.set(title=f"{cohort} cohort", xlabel="hours ahead", ylabel="error D(h)", ylim=(0, 1.6 * top))
        panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def _panels(count: int, width: float, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element without prolog and date, hidden from screen readers (its description speaks)."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # ids must be unique in the page that holds several figures
    own = hashlib.sha256(svg.encode()).hexdigest()[:6]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{own}-", svg)
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
