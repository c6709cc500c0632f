"""Plain sentences made from the numbers of a report, so that a reader need not read tables to know what was found."""

from collections.abc import Mapping
from typing import Any

COLLAPSE = {
    "STD_FELL": "some features have nearly stopped varying between patients",
    "LOW_RANK": "the embedding uses only a few directions of its width",
    "NO_CLASS_SIGNAL": "rows of one patient are no more alike than rows of different patients",
}
CHECKED = {
    "STD_FELL": "whether features stopped varying (no measurement before training was given)",
    "LOW_RANK": "whether few directions are used",
    "NO_CLASS_SIGNAL": "whether rows of one patient are alike (no patient has several rows)",
}


def reading(results: Mapping[str, Any]) -> list[str]:
    """What a table of ``judge`` says, site by site, then from inside to outside. Nothing is called better without an
    interval off zero and q < .05."""
    oracles = {arm["name"] for arm in results["arms"] if arm["oracle"]}
    sentences = [_site(site, found, results["reference"], oracles) for site, found in results["sites"].items()]
    if "outside" in results["sites"]:
        sentences.append(_fall(results["sites"], oracles))
    sentences += [_oracle(site, found, oracles) for site, found in results["sites"].items() if oracles]
    sentences += [text for site, found in results["sites"].items() if (text := _trivial(site, found, oracles))]
    return sentences


def collapse_reading(panels: Mapping[str, Any]) -> list[str]:
    """A sentence when any panel warns, so that it stands beside the results and not only far below them."""
    warned = [name for name, panel in panels.items() if panel["warnings"]]
    return [f"Signs of collapse: {join_words(warned)}; see the health of the embedding below."] if warned else []


def _trivial(site: str, found: Mapping[str, Any], oracles: set[str]) -> str:
    """Arms whose risks are worse than the prevalence told to everybody."""
    trivial = found["trivial"]["brier"]
    poor = [n for n, arm in found["arms"].items() if n not in oracles and arm["brier"]["value"] > trivial]
    if not poor:
        return ""
    return f"{site.capitalize()}, the risks of {join_words(poor)} are worse than telling everybody the prevalence (Brier score)."


def _site(site: str, found: Mapping[str, Any], reference: str, oracles: set[str]) -> str:
    arms = {name: arm for name, arm in found["arms"].items() if name not in oracles}
    top = max(arms, key=lambda name: arms[name]["auroc"]["value"])
    better, worse, even = [], [], []
    for name, arm in arms.items():
        gap = arm["auroc_difference"]
        if gap is None:
            continue
        sure = gap["interval"] is not None and gap["interval"][0] * gap["interval"][1] > 0 and gap["q"] < 0.05
        (even if not sure else better if gap["value"] > 0 else worse).append((name, gap))
    text = (
        f"{site.capitalize()} ({found['subjects']:,} patients, {found['positives']:,} of {found['rows']:,} rows positive): "
        f"the highest AUROC is that of {top}, {with_interval(arms[top]['auroc'])}."
    )
    for group, word in ((better, "better"), (worse, "worse")):
        if group:
            listed = join_words([f"{name} ({gap['value']:+z.3f})" for name, gap in group])
            text += f" Clearly {word} than {reference} (interval off zero, q below .05): {listed}."
    if even:
        smallest = max(gap["detectable"] for _, gap in even)
        text += (
            f" Not told apart from {reference} by these data: {join_words([name for name, _ in even])}"
            f" (a true difference below about {smallest:.3f} would probably be missed)."
        )
    return text


def _fall(sites: Mapping[str, Any], oracles: set[str]) -> str:
    pairs = {
        name: (arm["auroc"]["value"], sites["outside"]["arms"][name]["auroc"]["value"])
        for name, arm in sites["inside"]["arms"].items()
        if name not in oracles
    }
    order = sorted(pairs, key=lambda name: pairs[name][1] - pairs[name][0])
    listed = join_words([f"{name} {pairs[name][0]:.3f} to {pairs[name][1]:.3f}" for name in order])
    return f"AUROC from inside to outside, the largest fall first: {listed}."


def _oracle(site: str, found: Mapping[str, Any], oracles: set[str]) -> str:
    name = max(oracles, key=lambda oracle: found["arms"][oracle]["auroc"]["value"])
    bound = found["arms"][name]["auroc"]["value"]
    above = [
        arm
        for arm, measured in found["arms"].items()
        if arm not in oracles and measured["auroc"]["interval"] and measured["auroc"]["interval"][0] > bound
    ]
    text = f"{site.capitalize()}, the best score possible in this made world ({name}) reaches {bound:.3f}"
    if above:
        return f"{text}; {join_words(above)} lies above it, which no honest model can: look for a leak."
    return f"{text}; no arm lies above it."


def collapse_verdict(panel: Mapping[str, Any]) -> str:
    """One sentence for a collapse panel."""
    if panel["warnings"]:
        return "Warning: " + join_words([COLLAPSE[code] for code in panel["warnings"]]) + "."
    missing = [CHECKED[code] for code in panel["not_checked"]]
    if not missing:
        return "Healthy by all three checks."
    return "No sign of collapse in what could be checked; not checked: " + join_words(missing) + "."


def drift_sentence(summary: Mapping[str, Any]) -> str:
    """One paragraph for a rollout: growth of the error beside what forecasts nothing, and skill."""
    drift, last = summary["drift"]["fixed"], summary["horizon"]
    parts = [
        f"{name.replace('_', ' ')} {drift[name]['value']:+z.0f} %"
        for name in ("model", "copy_forward", "climatology")
        if name in drift
    ]
    text = f"From 1 to {last} hours ahead the error changes by {join_words(parts)} (same windows at every hour)."
    mase, skill = summary["mase_at_last"]["fixed"], summary["skill_at_last"]["fixed"]
    if mase is not None and skill is not None:
        text += f" At {last} hours the model's error is {mase:.2f} times that of copying the last known state, and its"
        text += f" skill over the training median of that hour is {skill:+z.2f} (0 = no better than that median)."
    return text


def value(measure: Mapping[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    """``0.812``; a dash where there is no value."""
    return "–" if measure is None or measure["value"] is None else _format(measure["value"], digits, sign)


def limits(measure: Mapping[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    """``0.771 to 0.850``; nothing where there is no value."""
    if measure is None or measure["value"] is None:
        return ""
    if measure["interval"] is None:
        return "no interval"
    return " to ".join(_format(end, digits, sign) for end in measure["interval"])


def with_interval(measure: Mapping[str, Any]) -> str:
    """``0.812 (0.771 to 0.850)``."""
    return f"{value(measure)} ({limits(measure)})"


def _format(number: float, digits: int, sign: bool) -> str:
    return format(number, f"{'+' if sign else ''}z.{digits}f")  # z: never -0.000


def join_words(words: list[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
