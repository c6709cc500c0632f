"""What the ICU stays are like, and what the best possible observer makes of them: rates, risks, forecasts, shifts.

Every number comes with a 95 % interval over stays, as {"value", "low", "high"}.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit, logit

from mmjepa.progress import track
from mmjepa.refusal import Refusal
from synthetic.draws import Array
from synthetic.icu import NONE, Icu, Stays, simulate
from synthetic.icu_filter import ParticleFilter
from synthetic.ranking import paired_difference

Number = dict[str, float]
DEATHS = ((12, 24), (24, 47))  # record seen to the first hour, death in the hours after it up to the second
FORECAST_FROM_H, FORECAST_H = 12, (1, 6, 12, 24, 35)
SWITCH_H, TREATED_H, LATER_H, MOVED_H = (0, 24), 20, 26, 36
SHIFTS = (
    ("policy_strength", 0.0),
    ("treatment_factor", 0.5),
    ("treatment_factor", 0.0),
    ("measured_slope", 0.0),
    ("discharge_bias", -3.6),
    ("lab_offset", 0.5),
)
LEGEND = """\
world: rates and course of all stays. moved_ratio: distance of the state of hour 36 from that of hour 0, deteriorating over
  stable. naive_*: treated less untreated at hour 20, among those in the unit after hour 26: change of the summed state by then,
  death later. death_, distance_<policy>_from_<hour>: the same patients under another policy from that hour on: death rate, mean
  distance of the last hour's state from the observed one.
record, state: death in hours 13-24 (record to hour 12) and 25-47 (to hour 24) of those still in the unit: the exact observer of
  the record, and one who knows the state. risk: mean of it; slope: calibration slope of its log-odds.
forecast: mean absolute error, summed over the three states, so many hours after hour 12. known: knows state, treatments, onset;
  onset_unknown: state and treatments; record: the record to hour 12, later treatments imposed; record_and_choices: they were the
  doctors' choice, and tell of the state; copy: the state of hour 12; climatology: the median of each hour.
floor: the least possible error of known, in closed form."""


def _number(value: float, error: float) -> Number:
    return {"value": float(value), "low": float(value - 1.96 * error), "high": float(value + 1.96 * error)}


def mean(x: Array) -> Number:
    """Mean of x with its interval."""
    return _number(x.mean(), x.std() / np.sqrt(len(x)))


def difference(x: Array, of: Array) -> Number:
    """Mean of x where ``of`` less the mean elsewhere."""
    return _number(
        x[of].mean() - x[~of].mean(), np.sqrt(x[of].var() / max(of.sum(), 1) + x[~of].var() / max((~of).sum(), 1))
    )


def ratio(x: Array, of: Array) -> Number:
    """Mean of x where ``of`` over the mean elsewhere; interval by the delta method."""
    a, b = mean(x[of]), mean(x[~of])
    value = a["value"] / b["value"]
    relative = [(m["high"] - m["value"]) / m["value"] / 1.96 for m in (a, b)]
    return _number(value, value * float(np.hypot(relative[0], relative[1])))


def auc(y: Array, score: Array) -> Number:
    """Area under the ROC curve of bool y, ties one half, with DeLong's interval."""
    above, error = paired_difference(y, score, np.zeros(len(y)))  # a score that says nothing has .5, without error
    return _number(0.5 + above, error)


def slope(y: Array, risk: Array) -> Number:
    """Calibration slope: of the logistic regression of y on the log-odds of ``risk``; 1 = calibrated."""
    x = np.stack([np.ones(len(risk)), logit(np.clip(risk, 1e-7, 1 - 1e-7))], axis=1)
    beta = np.array([logit(y.mean()), 0.0])
    for _ in range(25):
        p = expit(x @ beta)
        information = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)  # few cases may be told apart perfectly
        beta += np.linalg.solve(information, x.T @ (y - p))
    return _number(beta[1], np.sqrt(np.linalg.inv(information)[1, 1]))


def world_table(law: Icu, stays: int, seed: int) -> dict[str, Number]:
    """Rates, course, confounding and counterfactuals of the first ``stays`` stays.

    moved_ratio: distance of the state of hour 36 from that of hour 0, deteriorating over stable. naive_*: treated less
    untreated of hour 20 among those in the unit after hour 26: change of the summed state by hour 26, death later.
    death_<arm>_from_<hour>, distance_<arm>_from_<hour>: death rate, mean distance
    from the observed arm's state at the end, dead and discharged included.
    """
    found = simulate(law, seed, 0, stays)
    inside, sick, died = found.inside(), found.deteriorating, found.death_h != NONE
    moved = np.linalg.norm(found.states[:, MOVED_H] - found.states[:, 0], axis=1)
    there, still = found.end_h > MOVED_H, found.end_h > LATER_H
    severity, treated = found.states.sum(2), found.treated[:, TREATED_H]
    table = {
        "death": mean(died),
        "death_deteriorating": mean(died[sick]),
        "death_stable": mean(died[~sick]),
        "discharged": mean(found.discharge_h != NONE),
        "in_at_end": mean(found.end_h == law.hours),
        "hours_treated": mean(found.treated.mean(1)),
        "labs_measured": mean((~np.isnan(found.labs)).mean(2)[inside]),
        "moved_ratio_in_unit": ratio(moved[there], sick[there]),
        "moved_ratio_all": ratio(moved, sick),
        "naive_severity": difference((severity[:, LATER_H] - severity[:, TREATED_H])[still], treated[still]),
        "naive_death": difference(died[still], treated[still]),
    }
    for switch_h in SWITCH_H:
        for policy in ("never", "always"):
            arm = simulate(law, seed, 0, stays, policy, switch_h)
            apart = np.linalg.norm(arm.states[:, -1] - found.states[:, -1], axis=1)
            table[f"death_{policy}_from_{switch_h}"] = mean(arm.death_h != NONE)
            table[f"distance_{policy}_from_{switch_h}"] = mean(apart)
    return table


def spread(law: Icu, ahead_h: int) -> Array:
    """[3] sd of the state ``ahead_h`` hours on, given state, treatment and onset: what no forecast can remove."""
    keep = np.array(law.keep)[:, None] ** (2 * np.arange(ahead_h))
    return np.array(law.noise) * np.sqrt(keep.sum(1))


def floor_absolute(law: Icu, ahead_h: int) -> float:
    """Least expected |error| summed over the three states."""
    return float(np.sqrt(2 / np.pi) * spread(law, ahead_h).sum())


def known_course(stays: Stays, from_h: int, hours: tuple[int, ...]) -> Array:
    """[n, len(hours), 3] expected state given the state of ``from_h``, the treatment given, and the onset."""
    on, state, course = stays.on(), stays.states[:, from_h].T, {}
    for hour in range(from_h + 1, max(hours) + 1):
        state = stays.law.step(state, on[:, hour], stays.treated[:, hour - 1])
        course[hour] = state.T
    return np.stack([course[hour] for hour in hours], axis=1)


def forecast_table(stays: Stays, particles: int, seed: int) -> dict[str, Number]:
    """Mean absolute error, summed over the three states, 1 to 35 hours after hour 12, of those in the unit after it.

    Keys <who>_<hours>h. known: state, treatment and onset; onset_unknown: state and treatment; record: the record up
    to hour 12 and the later treatment, as if imposed; record_and_choices: and what its choice tells, which bounds a
    model that is shown the treatment on record; copy: the state of hour 12 stays; climatology: the median of all stays.
    """
    there = stays.take(stays.end_h > FORECAST_FROM_H)
    hours = tuple(FORECAST_FROM_H + h for h in FORECAST_H)
    observer = ParticleFilter(stays.law, stays.world, particles, seed)
    truth = there.states[:, hours]
    made = {
        "known": known_course(there, FORECAST_FROM_H, hours),
        "onset_unknown": observer.forecast(there, FORECAST_FROM_H, hours, know_state=True),
        "record": observer.forecast(there, FORECAST_FROM_H, hours),
        "record_and_choices": observer.forecast(there, FORECAST_FROM_H, hours, read_treatment=True),
        "copy": there.states[:, [FORECAST_FROM_H]],
        "climatology": np.median(truth, axis=0),
    }
    table = {}
    for who, forecast in made.items():
        errors = np.abs(forecast - truth).sum(2)
        table |= {f"{who}_{h}h": mean(errors[:, i]) for i, h in enumerate(FORECAST_H)}
    return table


def _deaths(stays: Stays, seen_h: int, last_h: int) -> tuple[Stays, Array]:
    """Stays that last beyond hour ``seen_h``, and whether they end in death up to ``last_h``."""
    there = stays.take(stays.end_h > seen_h)
    return there, (there.death_h != NONE) & (there.death_h <= last_h)


def risk_table(stays: Stays, law: Icu, particles: int, seed: int, know_state: bool = False) -> dict[str, Number]:
    """The observer's risk of death against the deaths: keys <what>_<first hour>_<last hour>, what being prevalence,
    risk, auc, slope. The observer believes in ``law``. know_state: one who also knows state, onset so far and treatment.
    """
    observer, table = ParticleFilter(law, stays.world, particles, seed), {}
    for seen_h, last_h in DEATHS:
        there, died = _deaths(stays, seen_h, last_h)
        risk = observer.risk(there, seen_h, last_h, know_state)
        found = {"prevalence": mean(died), "risk": mean(risk), "auc": auc(died, risk), "slope": slope(died, risk)}
        table |= {f"{name}_{seen_h + 1}_{last_h}": number for name, number in found.items()}
    return table


def _check(stays: int, particles: int, law: Icu) -> None:
    if not (500 <= stays <= 1_000_000 and 2 <= particles <= 100_000) or law.hours < 48:
        raise Refusal(
            "SYNTHETIC_RANGE", "ICU tables need 500 to 1000000 stays, 2 to 100000 particles, 48 hours or more"
        )


def icu_table(stays: int, particle_stays: int, particles: int, seed: int, law: Icu | None = None) -> dict[str, dict]:
    """All of it: ``world`` from ``stays`` stays; ``record``, ``state`` (risk tables) and ``forecast`` from the first
    ``particle_stays``; ``floor``, the least possible forecast error. Raises Refusal SYNTHETIC_RANGE.
    """
    law = law or Icu()
    _check(min(stays, particle_stays), particles, law)
    few = simulate(law, seed, 0, particle_stays)
    parts: dict[str, Callable[[], dict]] = {
        "world": lambda: world_table(law, stays, seed),
        "record": lambda: risk_table(few, law, particles, seed),
        "state": lambda: risk_table(few, law, particles, seed, know_state=True),
        "forecast": lambda: forecast_table(few, particles, seed),
        "floor": lambda: {f"{h}h": floor_absolute(law, h) for h in FORECAST_H},
    }
    return {name: make() for name, make in track(parts.items(), "ICU tables", len(parts))}


def icu_shift_table(stays: int, particles: int, seed: int, law: Icu | None = None) -> dict[str, dict[str, Number]]:
    """One knob at a time: death rate, and AUC of the observer who knows the site's law (env) or believes in ``law``
    (source), for both windows of death. Raises Refusal SYNTHETIC_RANGE.
    """
    law = law or Icu()
    _check(stays, particles, law)
    table = {}
    sites = {"internal": law} | {f"{knob}={value:g}": replace(law, **_knob(knob, value)) for knob, value in SHIFTS}
    for name, site in track(sites.items(), "Knobs", len(sites)):
        found = simulate(site, seed, 0, stays)
        table[name] = {"death": mean(found.death_h != NONE)}
        judged = {believed: risk_table(found, believed, particles, seed) for believed in {site, law}}
        for who, believed in (("env", site), ("source", law)):
            kept = {key: number for key, number in judged[believed].items() if key.startswith(("auc", "risk"))}
            table[name] |= {f"{who}_{key}": number for key, number in kept.items()}
    return table


def _knob(name: str, value: float) -> dict[str, Any]:
    return {name: value}
