"""Nodules over time: untreated growth that tells the label, with its exact log-odds; and tumours under treatment.

**Growth.** A nodule's volume doubling time (VDT) depends on the label, d(t) = d0 2^(t / 3 VDT). Scan 0 shows d0 itself, so
one scan is the single-CT world, byte for byte. Given the label, growth is independent of everything else; it is the one way
by which a rendered CT knows the label beyond the measurements theta. Since d0 is a function of theta,

    log-odds(label | theta, every scan) = log-odds(label | theta) + ``growth_log_odds``,

exactly, for the true label (before any ``label_flip``). This sum, not the first term alone, bounds models that see later scans.
The VDT laws are ours, set beside published cohorts of lung cancers (medians 98 to 357 days: Henschke 2012, Wilson 2012; mean
452: Hasegawa 2000) and the usual thresholds of 400 and 600 days (NELSON).

**Treatment.** Geng et al., Sci Rep 2017 (7:13542), as simulated by Lim et al., NeurIPS 2018, and Bica et al., ICLR 2020
(arXiv:2002.04083): Gompertz growth, chemotherapy, radiotherapy; larger tumours are treated more often. Policies share every
draw, so that two of them are the two arms of one subject's counterfactual.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_ndtr, logsumexp, ndtr, ndtri

from mmjepa.refusal import Refusal
from synthetic.draws import Array, normals, uniforms
from synthetic.icu import POLICIES, Policy

SCAN_DAYS = (0.0, 90.0, 365.0)  # of the first, second and third scan, the later ones each within 20 %
CAP_MM = (
    26.0  # what a 32 mm patch holds: it cuts the ellipsoid of 1 % of the third scans and of a quarter of those capped
)
LOG_VDT = {True: (np.log(250.0), 0.5), False: (np.log(900.0), 0.6)}  # mean and sd of log days: malignant, benign
NOISE = 0.05  # sd of a later log diameter about its growth curve
_PER_VDT = np.log(2) / 3  # growth of the log diameter in one doubling time
_REACH, _NODES = 9.0, 128  # sd on either side that the quadrature covers, and its nodes


def scan_days(seed: int, first: int, count: int, scans: int) -> Array:
    """Days of each scan since the first, [count, scans], increasing, 0 in column 0.

    scans: 1..3, else Refusal ``SYNTHETIC_RANGE``. Fewer scans are the first columns of more.
    """
    if scans not in range(1, len(SCAN_DAYS) + 1):
        raise Refusal("SYNTHETIC_RANGE", f"scans={scans} is outside 1..{len(SCAN_DAYS)}")
    u = uniforms(seed, "growth/days", first, count, len(SCAN_DAYS))
    return (np.array(SCAN_DAYS) * (0.8 + 0.4 * u))[:, :scans]


def log_vdt(y: Array, seed: int, first: int) -> Array:
    """Log of the volume doubling time in days, [n], of subjects first .. first + n - 1 with labels y [n] bool."""
    mean, sd = (np.where(y, LOG_VDT[True][k], LOG_VDT[False][k]) for k in (0, 1))
    return mean + sd * normals(seed, "growth/vdt", first, len(y), 1)[:, 0]


def diameters(d0_mm: Array, y: Array, seed: int, first: int, scans: int) -> Array:
    """Diameter in mm of each subject's nodule at each of its ``scan_days``, [n, scans]; column 0 is d0_mm itself.

    d0_mm [n], y [n] bool: of subjects first .. first + n - 1. Later scans stop at ``CAP_MM``; scan 0 is never capped.
    """
    days = scan_days(seed, first, len(y), scans)[:, 1:]
    noise = normals(seed, "growth/noise", first, len(y), len(SCAN_DAYS))[:, 1:scans]
    later = d0_mm[:, None] * np.exp(_PER_VDT * days * np.exp(-log_vdt(y, seed, first))[:, None] + NOISE * noise)
    return np.concatenate([d0_mm[:, None], np.minimum(later, CAP_MM)], axis=1)


def growth_log_odds(log_d: Array, days: Array) -> Array:
    """log p(later diameters | first, malignant) - log p(later diameters | first, benign), [n]; 0 with one scan.

    log_d [n, k]: log diameters in mm, the first exact, the later ones as ``diameters`` gives them; one at the cap tells only
    that it reached the cap. days [n, k]: of each scan since the first. No prior of the first diameter enters: it is known.
    """
    if log_d.shape[1] == 1:
        return np.zeros(len(log_d))
    # A later scan measures the rate 1 / VDT: Gaussian about its own value, or one-sided at the cap.
    per_rate = _PER_VDT * days[:, 1:]
    grown, capped = log_d[:, 1:] - log_d[:, :1], log_d[:, 1:] >= np.log(CAP_MM)
    slack = _REACH * NOISE
    low = np.max((grown - slack) / per_rate, axis=1)
    high = np.min(np.where(capped, np.inf, (grown + slack) / per_rate), axis=1)
    malignant, benign = (_log_evidence(grown, per_rate, capped, low, high, LOG_VDT[y]) for y in (True, False))
    return malignant - benign


def _log_evidence(
    grown: Array, per_rate: Array, capped: Array, low: Array, high: Array, law: tuple[float, float]
) -> Array:
    """log p(grown | law of log VDT), [n], but for a constant.

    Trapezoids over log VDT where neither the prior nor the likelihood (rates low .. high) is negligible: the integrand
    vanishes at both ends, so that the rule converges exponentially. (Gauss-Hermite nodes fixed under the prior lie too far
    apart for a fast nodule, whose scans leave one fiftieth of the prior's width.)
    """
    mean, sd = law
    tiny = np.finfo(float).tiny
    start = np.maximum(mean - _REACH * sd, -np.log(np.maximum(high, tiny)))
    end = np.minimum(mean + _REACH * sd, -np.log(np.maximum(low, tiny)))
    step = (end - start) / (_NODES - 1)
    nodes = start[:, None] + step[:, None] * np.arange(_NODES)
    total = -0.5 * ((nodes - mean) / sd) ** 2
    rate = np.exp(-nodes)
    for j in range(grown.shape[1]):
        z = (grown[:, j, None] - per_rate[:, j, None] * rate) / NOISE
        total += np.where(capped[:, j, None], log_ndtr(-z), -0.5 * z**2)
    return logsumexp(total, axis=1) + np.log(step) - np.log(sd)


def volume_cm3(diameter: Array | float) -> Array:
    """Volume of spheres of that diameter in cm."""
    return np.pi / 6 * np.asarray(diameter) ** 3


def diameter_cm(volume: Array | float) -> Array:
    """Diameter of spheres of that many cm3."""
    return np.cbrt(np.asarray(volume) * (6 / np.pi))


DAYS = 60  # of a course, one step a day
DEATH_CM = 13.0  # diameter that kills
_LETHAL_CM3, _CAPACITY_CM3 = volume_cm3(DEATH_CM), volume_cm3(30.0)  # growth would stop at 30 cm
CELLS_PER_CM3 = 5.8e8
WINDOW_DAYS = 15  # over which treatment looks at the diameter
CHEMO_MG_M3, HALF_LIFE_DAYS, FRACTION_GY = 5.0, 1.0, 2.0
_GROWTH, _ALPHA, _CHEMO, _CORRELATION = (7e-5, 0.00723), (0.0398, 0.168), (0.028, 0.0007), 0.87  # (mean, sd)
_ALPHA_BETA_GY, _VOLUME_NOISE = 10.0, 0.01
# Stage: share of 22954 patients, then the log-normal diameter (cm) and where it is cut off.
_STAGES = np.array(
    [
        (1432, 1.72, 4.70, 0.3, 5.0),
        (128, 1.96, 1.63, 0.3, 13.0),
        (1306, 1.91, 9.40, 0.3, 13.0),
        (7248, 2.76, 6.87, 0.3, 13.0),
        (12840, 3.86, 8.82, 0.3, 13.0),
    ]
)
_TRIES = 64  # candidate pairs for two correlated positive rates; each is accepted with probability .45


@dataclass(frozen=True)
class Courses:
    """n tumours over ``DAYS`` days; row i is subject first + i.

    volume_cm3 [n, DAYS]: 0 from cure on, the lethal volume from death on. chemo, radio [n, DAYS] bool: given that day, felt
    the next. propensity [n, DAYS]: probability, under the observed policy and this arm's past, of each of the two treatments
    (drawn independently); 0 on day 0 and after cure or death.
    """

    volume_cm3: Array
    chemo: Array
    radio: Array
    propensity: Array


def tumour_rates(seed: int, first: int, count: int) -> tuple[Array, Array, Array]:
    """Growth r (per day), radiosensitivity alpha (per Gy) and chemosensitivity b_c (per mg/m3), each [count] and above 0.

    (r, alpha) is Gaussian with correlation .87, given that both are above 0: their means, .0062 and .174, and correlation, .72,
    are then not the Gaussian's own.
    """
    pairs = normals(seed, "treated/rates", first, count, 2 * _TRIES).reshape(count, _TRIES, 2)
    alpha = _ALPHA[0] + _ALPHA[1] * pairs[:, :, 0]
    own = np.sqrt(1 - _CORRELATION**2) * pairs[:, :, 1]
    growth = _GROWTH[0] + _GROWTH[1] * (_CORRELATION * pairs[:, :, 0] + own)
    pick = np.argmax((alpha > 0) & (growth > 0), axis=1)  # none of 64 would happen once in 10^16 subjects
    rows = np.arange(count)
    chemo = _CHEMO[0] + _CHEMO[1] * normals(seed, "treated/chemo_effect", first, count, 1)[:, 0]  # 40 sd above 0
    return growth[rows, pick], alpha[rows, pick], chemo


def first_diameter_cm(seed: int, first: int, count: int) -> Array:
    """Diameter at the start, [count]: the stage by its share, then its truncated log-normal."""
    u = uniforms(seed, "treated/start", first, count, 2)
    share = np.cumsum(_STAGES[:, 0]) / _STAGES[:, 0].sum()
    _, mean, sd, low, high = _STAGES[np.searchsorted(share[:-1], u[:, 0], side="right")].T
    below, above = ndtr((np.log(low) - mean) / sd), ndtr((np.log(high) - mean) / sd)
    return np.exp(mean + sd * ndtri(below + (above - below) * u[:, 1]))


def courses(seed: int, first: int, count: int, confounding: float, policy: Policy = "observed") -> Courses:
    """Tumours of subjects first .. first + count - 1 under a policy.

    observed: chemotherapy and a radiotherapy fraction each with probability
    sigm((confounding / 13 cm)(mean diameter of the last 15 days - 6.5 cm)), a coin's toss at confounding 0; never and always
    as they say. No subject's tumour is ever larger than under never. Refusal ``SYNTHETIC_UNKNOWN``: another policy; ``SYNTHETIC_RANGE``: a negative confounding.
    """
    if policy not in POLICIES:
        raise Refusal("SYNTHETIC_UNKNOWN", f"no policy is called {policy!r}", f"Known: {', '.join(POLICIES)}")
    if not confounding >= 0:
        raise Refusal("SYNTHETIC_RANGE", f"confounding={confounding} is below 0")
    growth, alpha, chemo_effect = tumour_rates(seed, first, count)
    killed = alpha * FRACTION_GY + alpha / _ALPHA_BETA_GY * FRACTION_GY**2  # share of the volume, by one fraction
    shock = _VOLUME_NOISE * normals(seed, "treated/noise", first, count, DAYS)
    coin, ray, luck = (uniforms(seed, f"treated/{name}", first, count, DAYS) for name in ("chemo", "radio", "cure"))
    volume, propensity = np.zeros((count, DAYS)), np.zeros((count, DAYS))
    chemo, radio = np.zeros((count, DAYS), bool), np.zeros((count, DAYS), bool)
    volume[:, 0] = volume_cm3(first_diameter_cm(seed, first, count))
    drug, summed_cm = np.zeros(count), np.zeros((count, DAYS))  # summed_cm: diameters of all earlier days
    for day in range(1, DAYS):
        before = volume[:, day - 1]
        kill = chemo_effect * drug + killed * radio[:, day - 1]
        volume[:, day] = _next_volume(before, growth, shock[:, day] - kill, luck[:, day])
        summed_cm[:, day] = summed_cm[:, day - 1] + diameter_cm(before)
        window = min(day, WINDOW_DAYS)
        mean_cm = (summed_cm[:, day] - summed_cm[:, day - window]) / window
        ongoing = (volume[:, day] > 0) & (volume[:, day] < _LETHAL_CM3)
        propensity[:, day] = ongoing * expit(confounding / DEATH_CM * (mean_cm - DEATH_CM / 2))
        chance = {"observed": propensity[:, day], "never": 0.0, "always": 1.0 * ongoing}[policy]
        chemo[:, day], radio[:, day] = coin[:, day] < chance, ray[:, day] < chance
        drug = drug * 0.5 ** (1 / HALF_LIFE_DAYS) + CHEMO_MG_M3 * chemo[:, day]
    return Courses(volume, chemo, radio, propensity)


def _next_volume(volume: Array, growth: Array, change: Array, luck: Array) -> Array:
    """Volume a day later, [n]: growth and relative change, until death or, by luck and the cells left, cure."""
    ongoing = (volume > 0) & (volume < _LETHAL_CM3)
    gompertz = growth * np.log(_CAPACITY_CM3 / np.where(ongoing, volume, _CAPACITY_CM3))
    after = np.clip(volume * (1 + gompertz + change), 0, _LETHAL_CM3)
    after[luck < np.exp(-after * CELLS_PER_CM3)] = 0
    return np.where(ongoing, after, volume)
