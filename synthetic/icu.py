"""Hourly ICU stays with known state, onset and treatment effect, and their counterfactual arms.

Hour t of a stay, t = 0 .. hours - 1: the state moves, labs are drawn (more often in the sick), treatment is decided on
the state (so it is confounded) and acts in the next hour, then the patient may die, else may leave. The state of a patient
who left goes on in the truth, unseen.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from scipy.special import expit, ndtri

from mmjepa.refusal import Refusal
from synthetic.draws import Array, generator, normals, uniforms

Policy = Literal["observed", "never", "always"]
POLICIES = ("observed", "never", "always")
STATES, LABS = 3, 12
NONE = -1  # hour of an event that did not come
BLOCK = 1000  # stays simulated at a time, for the cache; no byte depends on it


@dataclass(frozen=True, kw_only=True)
class Icu:
    """The law of one site's stays; a site's knobs are fields, their defaults neutral.

    State (3, severity; 0 = the average admission): S_t = keep S_{t-1} + drift (deteriorating, t >= onset)
    + treatment_factor effect a_{t-1} + noise w_t, per hour, elementwise; S_{-1} ~ N(0, start_sd^2).
    deteriorating: share of stays; onset_h: mean hour of onset (exponential).
    policy_strength: slope of treatment on the state, 0 = a coin is tossed. policy_weight, policy_offset: on the state.
    lab_noise: sd beside loadings of about .8. lab_offset: sd between labs of this site's constant shift.
    measured_bias, measured_slope: log-odds that a lab is drawn in an hour, slope on the mean state (within +-3).
    death_bias, death_weight, discharge_bias, discharge_weight: log hazard per hour.
    """

    hours: int = 48
    keep: tuple[float, float, float] = (0.97, 0.95, 0.98)
    drift: tuple[float, float, float] = (0.12, 0.15, 0.10)
    effect: tuple[float, float, float] = (-0.06, -0.08, -0.04)
    noise: tuple[float, float, float] = (0.06, 0.08, 0.05)
    start_sd: float = 0.6
    deteriorating: float = 0.25
    onset_h: float = 10.0
    policy_strength: float = 1.5
    policy_weight: tuple[float, float, float] = (0.8, 0.8, 0.4)
    policy_offset: float = -1.8
    treatment_factor: float = 1.0
    lab_noise: float = 0.8
    lab_offset: float = 0.0
    measured_bias: float = -1.0
    measured_slope: float = 0.35
    death_bias: float = -8.0
    death_weight: tuple[float, float, float] = (1.1, 1.1, 0.9)
    discharge_bias: float = -4.6
    discharge_weight: tuple[float, float, float] = (-0.8, -0.8, -0.8)

    def __post_init__(self) -> None:
        wrong = [name for name, (low, high) in _RANGES.items() if not _within(getattr(self, name), low, high)]
        wrong += [f.name for f in fields(self) if isinstance(f.default, tuple) and len(getattr(self, f.name)) != STATES]
        if wrong:
            raise Refusal("SYNTHETIC_RANGE", f"{', '.join(dict.fromkeys(wrong))} of the ICU law out of range")

    def step(self, state: Array, on: Array, treated: Array) -> Array:
        """Expected next state. Here and below a state is [3, ...]; on and treated: [...] bool."""
        shape = (STATES,) + (1,) * (state.ndim - 1)
        keep, drift, effect = (np.array(v, state.dtype).reshape(shape) for v in (self.keep, self.drift, self.effect))
        moved = state * keep
        moved += on * drift
        moved += treated * (effect * state.dtype.type(self.treatment_factor))
        return moved

    def treat_logit(self, state: Array) -> Array:
        """Log-odds of treatment at a state."""
        return self.policy_strength * (weighted(state, self.policy_weight) + self.policy_offset)

    def measured_logit(self, state: Array) -> Array:
        """Log-odds that a lab is drawn in an hour."""
        return self.measured_bias + self.measured_slope * np.clip(weighted(state, (1 / 3,) * 3), -3, 3)

    def death_rate(self, state: Array) -> Array:
        """Hazard of death in an hour: the chance is 1 - exp(-rate)."""
        return np.exp(self.death_bias + weighted(state, self.death_weight))

    def discharge_rate(self, state: Array) -> Array:
        """Hazard of discharge in an hour among those who did not die in it."""
        return np.exp(self.discharge_bias + weighted(state, self.discharge_weight))

    def onset_hazard(self) -> Array:
        """[hours] chance that the drift begins in an hour, given that it has not: onset as a Markov state."""
        passed = self.deteriorating * -np.expm1(-np.arange(-1, self.hours) / self.onset_h)
        passed[0] = 0
        return np.diff(passed) / (1 - passed[:-1])


# within them, one knob at a time, every rate is finite and so is the observer's float32
_RANGES: dict[str, tuple[float, float]] = {
    "hours": (1, 1000),
    "keep": (0, 1),
    "drift": (-1, 1),
    "effect": (-1, 1),
    "noise": (1e-3, 1),
    "start_sd": (1e-3, 5),
    "deteriorating": (0, 1),
    "onset_h": (0.1, 1e4),
    "policy_strength": (-10, 10),
    "policy_weight": (-2, 2),
    "policy_offset": (-10, 10),
    "treatment_factor": (-5, 5),
    "lab_noise": (0.05, 50),
    "lab_offset": (0, 50),
    "measured_bias": (-10, 10),
    "measured_slope": (-5, 5),
    "death_bias": (-60, 30),
    "death_weight": (-3, 3),
    "discharge_bias": (-60, 30),
    "discharge_weight": (-3, 3),
}


def _within(value: float | tuple[float, ...], low: float, high: float) -> bool:
    return bool(((low <= np.array(value)) & (np.array(value) <= high)).all())


def weighted(state: Array, weight: tuple[float, ...]) -> Array:
    """``weight @ state`` over the first axis, the same bytes whatever the shape of the rest."""
    return state[0] * weight[0] + state[1] * weight[1] + state[2] * weight[2]


@dataclass(frozen=True)
class IcuWorld:
    """Constants of one seed. loading [12, 3]: labs on the state; shift [12]: standard normal, of a site's labs."""

    loading: Array
    shift: Array

    @classmethod
    def of(cls, seed: int) -> "IcuWorld":
        """The constants drawn from a seed."""
        return cls(
            0.8 * generator(seed, "world/icu/labs").standard_normal((LABS, STATES)),
            generator(seed, "world/icu/lab_shift").standard_normal(LABS),
        )

    def lab_shift(self, law: Icu) -> Array:
        """[12] constant shift of each lab at a site."""
        return law.lab_offset * self.shift


@dataclass(frozen=True)
class Stays:
    """n simulated stays, row i being stay ``index[i]``.

    states [n, T, 3] and treated [n, T] bool: the truth, past the end of a stay as well. labs [n, T, 12] float32, NaN
    where not drawn and after the end. death_h, discharge_h [n]: the hour of the event, NONE without. onset_h [n]: hour from
    which the drift acts (real-valued), infinite in the stable.
    """

    law: Icu
    world: IcuWorld
    index: Array
    states: Array
    treated: Array
    labs: Array
    death_h: Array
    discharge_h: Array
    onset_h: Array

    @property
    def deteriorating(self) -> Array:
        """[n] bool."""
        return np.isfinite(self.onset_h)

    @property
    def end_h(self) -> Array:
        """[n] last hour in the unit (death or discharge), ``law.hours`` for those still in at the end."""
        ended = np.maximum(self.death_h, self.discharge_h)
        return np.where(ended == NONE, self.law.hours, ended)

    def take(self, rows: Array | slice) -> "Stays":
        """Some of the stays, by row or mask."""
        columns = (f.name for f in fields(self) if f.name not in ("law", "world"))
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def inside(self) -> Array:
        """[n, T] bool: hours spent in the unit, the one of the end included."""
        return np.arange(self.law.hours) <= self.end_h[:, None]

    def on(self) -> Array:
        """[n, T] bool: hours in which the drift acts."""
        return np.arange(self.law.hours) >= self.onset_h[:, None]


def simulate(law: Icu, seed: int, first: int, count: int, policy: Policy = "observed", switch_h: int = 0) -> Stays:
    """Stays first .. first + count - 1. From hour ``switch_h`` on treatment follows ``policy``, before it the law.

    (seed, stay) fixes state noise, lab noise, and the uniforms of measurement, treatment, death and discharge, whatever
    the law, the policy and the batch: arms are the same patients. Raises Refusal SYNTHETIC_UNKNOWN, SYNTHETIC_RANGE.
    """
    if policy not in POLICIES:
        raise Refusal("SYNTHETIC_UNKNOWN", f"no policy is called {policy!r}", f"Known: {', '.join(POLICIES)}")
    if not (0 <= switch_h <= law.hours and count >= 1 and first >= 0):
        raise Refusal("SYNTHETIC_RANGE", "an ICU cohort needs count >= 1, first >= 0, 0 <= switch_h <= hours")
    world = IcuWorld.of(seed)
    parts = [
        _simulate(law, world, seed, start, min(BLOCK, first + count - start), policy, switch_h)
        for start in range(first, first + count, BLOCK)
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Stays(law=law, world=world, index=np.arange(first, first + count), **columns)


def _simulate(
    law: Icu, world: IcuWorld, seed: int, first: int, n: int, policy: Policy, switch_h: int
) -> dict[str, Array]:
    """The columns of one block of stays."""
    u = uniforms(seed, "icu/onset", first, n, 2)
    onset_h = np.where(u[:, 0] < law.deteriorating, -law.onset_h * np.log(u[:, 1]), np.inf)
    states, treated = _trajectory(law, seed, first, n, policy, switch_h, onset_h)
    dies = uniforms(seed, "icu/death", first, n, law.hours) < -np.expm1(-law.death_rate(states))
    leaves = uniforms(seed, "icu/discharge", first, n, law.hours) < -np.expm1(-law.discharge_rate(states))
    death_h, discharge_h = _first_hour(dies), _first_hour(leaves)
    died = (death_h != NONE) & ((discharge_h == NONE) | (death_h <= discharge_h))
    death_h, discharge_h = np.where(died, death_h, NONE), np.where(died, NONE, discharge_h)
    ended = np.maximum(death_h, discharge_h)
    seen = np.arange(law.hours) <= np.where(ended == NONE, law.hours, ended)[:, None]
    return {
        "states": np.moveaxis(states, 0, -1),
        "treated": treated,
        "labs": _labs(law, world, seed, first, states, seen),
        "death_h": death_h,
        "discharge_h": discharge_h,
        "onset_h": onset_h,
    }


def _first_hour(happens: Array) -> Array:
    """[n, T] bool -> [n] first hour that is true, NONE if there is none."""
    return np.where(happens.any(1), happens.argmax(1), NONE)


def _trajectory(
    law: Icu, seed: int, first: int, n: int, policy: Policy, switch_h: int, onset_h: Array
) -> tuple[Array, Array]:
    """States [3, n, T] and treatments [n, T]."""
    noise = normals(seed, "icu/process", first, n, law.hours * STATES).reshape(n, law.hours, STATES)
    noise = (noise * np.array(law.noise)).transpose(1, 2, 0)
    coin = uniforms(seed, "icu/treatment", first, n, law.hours)
    states, treated = np.empty((STATES, n, law.hours)), np.empty((n, law.hours), dtype=bool)
    state, acting = law.start_sd * normals(seed, "icu/start", first, n, STATES).T, np.zeros(n, dtype=bool)
    for hour in range(law.hours):
        state = law.step(state, hour >= onset_h, acting) + noise[hour]
        if policy == "observed" or hour < switch_h:
            acting = coin[:, hour] < expit(law.treat_logit(state))
        else:
            acting = np.full(n, policy == "always")
        states[:, :, hour], treated[:, hour] = state, acting
    return states, treated


def _labs(law: Icu, world: IcuWorld, seed: int, first: int, states: Array, seen: Array) -> Array:
    """Labs [n, T, 12] float32; normals are made only for the labs that are drawn. states: [3, n, T]."""
    n, width = states.shape[1], law.hours * LABS
    drawn = uniforms(seed, "icu/lab_measured", first, n, width).reshape(n, law.hours, LABS)
    stay, hour, lab = np.nonzero((drawn < expit(law.measured_logit(states))[..., None]) & seen[..., None])
    noise = uniforms(seed, "icu/lab_noise", first, n, width)[stay, hour * LABS + lab]
    value = weighted(states[:, stay, hour] * world.loading.T[:, lab], (1, 1, 1)) + law.lab_noise * ndtri(noise)
    if law.lab_offset:
        value += world.lab_shift(law)[lab]
    labs = np.full((n, law.hours, LABS), np.nan, dtype=np.float32)
    labs[stay, hour, lab] = value
    return labs
