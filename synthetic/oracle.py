"""Exact Bayes scores of the label given the measurements: what no model can beat, and why a model might seem to.

Since c and z are Gaussian given the label, p(y, theta) is a Gaussian density times a one-dimensional logistic-normal
integral, taken with 40 Gauss-Hermite nodes. Scores are true log-odds of the outcome; a site's recorded labels that are wrong
at random, or late, leave their order optimal (``recorded`` tells their own log-odds). Rendered CTs and events are functions of theta and label-free noise, so these
scores bound every model on them too.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

import joblib
import numpy as np
from scipy.special import expit, log_expit, logit
from threadpoolctl import threadpool_limits

from mmjepa.progress import track
from mmjepa.refusal import Refusal
from synthetic import arms
from synthetic.draws import Array, by_row
from synthetic.presets import FOLLOW_UP_DAYS, SITES, Site, find_site, pick
from synthetic.ranking import auc, summary
from synthetic.world import MODALITIES, NODES, WEIGHTS, Subjects, World

Result = TypeVar("Result")
CEILING_LABELS = (100, 200, 400, 1000, 4000)
VIEWS: dict[str, tuple[str, ...]] = {"image": ("image",), "ehr": ("ehr",), "both": MODALITIES}


def log_joint(world: World, site: Site, theta: Array, modalities: tuple[str, ...]) -> Array:
    """log p(y, theta) under ``site``'s law for y = 0 and 1, [n, 2], but for a constant that is the same for all.

    theta: [n, sum d], the measurements of ``modalities`` side by side.
    """
    preset, law = world.preset, world.law(site)
    rows = {"image": np.arange(preset.d_image), "ehr": world.channels(site)}
    A = np.concatenate([world.A[m][rows[m]] for m in modalities])
    B = np.concatenate([world.B[m][rows[m]] for m in modalities])
    noise = np.concatenate([np.full(len(rows[m]), law.tau[m] ** 2) for m in modalities])
    P, w, b = law.variance, law.w, B.sum(1)
    Pw = P * w
    T = np.diag(noise) + B @ B.T + (A * P) @ A.T
    gain = np.linalg.solve(T, np.stack([A @ Pw, b], axis=1)).T
    v = w @ Pw - (A @ Pw) @ gain[0]
    centred = theta - (A @ law.mean + site.c_mean * b)
    projected = by_row(gain, centred)
    nodes = np.sqrt(v) * NODES
    scores = []
    for sign in (-1, 1):
        # the density around sign * rho * b, less what both signs share: + sign rho b'T^-1 x
        m = law.bias + w @ law.mean + projected[:, :1] - sign * site.rho * (gain[0] @ b)
        risk = (WEIGHTS / (1 + np.exp(-sign * (m + nodes)))).sum(1)  # expit is slower; a product would round by batch
        scores.append(sign * site.rho * projected[:, 1] + np.log(risk))
    return np.stack(scores, axis=1)


def prior_log_odds(world: World, site: Site) -> float:
    """Log-odds of the outcome at ``site`` when nothing is measured."""
    law = world.law(site)
    return float(logit(WEIGHTS @ expit(law.bias + law.w @ law.mean + np.sqrt(law.w**2 @ law.variance) * NODES)))


def log_odds(world: World, site: Site, theta: Array, modalities: tuple[str, ...]) -> Array:
    """log p(y=1 | theta) - log p(y=0 | theta) under ``site``'s law, [n]; theta as in ``log_joint``."""
    joint = log_joint(world, site, theta, modalities)
    return joint[:, 1] - joint[:, 0]


def score(world: World, site: Site, subjects: Subjects, view: str) -> Array:
    """``log_odds`` of a view for subjects of whom some may have no record: they are judged by what else there is, [n]."""
    found = log_odds(world, site, subjects.theta_of(VIEWS[view]), VIEWS[view])
    blind = ~subjects.seen_ehr
    if view == "both" and blind.any():
        found[blind] = log_odds(world, site, subjects.theta["image"][blind], ("image",))
    elif view == "ehr":
        found[blind] = prior_log_odds(world, site)
    return found


def env_bayes(world: World, site: Site, subjects: Subjects, view: str) -> Array:
    """The site's own optimum: above it (beyond noise) lies a leak."""
    return score(world, site, subjects, view)


def c_blind(world: World, site: Site, subjects: Subjects, view: str) -> Array:
    """The optimum of one who holds that the care pathway says nothing of the label (rho = 0)."""
    return score(world, replace(site, rho=0.0), subjects, view)


def source_bayes(world: World, subjects: Subjects, view: str) -> Array:
    """The internal site's optimum, applied wherever the subjects come from: training with unlimited labels."""
    return score(world, world.internal, subjects, view)


def recorded(site: Site, score: Array) -> Array:
    """Log-odds of the label that ``site`` records, late or wrong at random, from the log-odds of the outcome, [n].

    Within a site the order is the same; among sites that record differently it is not.
    """
    soonest, latest = FOLLOW_UP_DAYS
    if site.follow_up_days < latest:
        log_found = log_expit(score) + np.log((site.follow_up_days - soonest) / (latest - soonest))
        score = log_found - np.log1p(-np.exp(log_found))
    if site.label_flip:
        score = logit(site.label_flip + (1 - 2 * site.label_flip) * expit(score))
    return score


def scores(world: World, site: Site, subjects: Subjects) -> dict[str, Array]:
    """Every oracle of subjects of ``site``, {``<oracle>_<view>`` or ``causal_z``: [n]}; causal_z knows the latents, not c."""
    found = {"causal_z": subjects.eta}
    for view in VIEWS:
        found[f"env_bayes_{view}"] = env_bayes(world, site, subjects, view)
        found[f"source_bayes_{view}"] = source_bayes(world, subjects, view)
        found[f"c_blind_{view}"] = c_blind(world, site, subjects, view)
    return found


def table(preset: str, site: str, patients: int, seed: int) -> dict[str, float]:
    """AUC of every oracle (keys of ``scores``) on ``patients`` fresh subjects of a named site, the prevalence, and
    ``ceiling_<n>``: tuned ridge that learnt from n labels of the internal site, handed the sufficient statistic.
    """
    world, law = World.named(preset, seed), find_site(preset, site)
    subjects = world.sample(law, arms.TEST, patients)
    row = {"prevalence": float(subjects.y.mean())}
    row |= {name: auc(subjects.y, found) for name, found in scores(world, law, subjects).items()}
    theta = subjects.theta_of(MODALITIES)
    for n, weights in arms.ceiling(world, world.internal, CEILING_LABELS).items():
        row[f"ceiling_{n}"] = auc(subjects.y, by_row(weights[None], theta)[:, 0])
    return row


def over_seeds(job: Callable[[int], Result], seeds: int, workers: int, label: str) -> list[Result]:
    """``job(seed)`` for seeds 0 .. seeds - 1 in ``workers`` processes, with progress; one thread each, so equal bytes."""
    jobs = (joblib.delayed(_single_threaded)(job, seed) for seed in range(seeds))
    with closing(joblib.Parallel(min(workers, seeds), return_as="generator")(jobs)) as results:
        return list(track(results, label, seeds))


def _single_threaded(job: Callable[[int], Result], seed: int) -> Result:
    with threadpool_limits(1):  # threads only slow small products down, and their number decides the last bits
        return job(seed)


def check_range(patients: int, least: int, seeds: int, workers: int) -> None:
    """Refusal ``SYNTHETIC_RANGE`` for numbers with which no table can be made."""
    for what, value, low, high in (
        ("patients", patients, least, 1_000_000),
        ("seeds", seeds, 1, 10_000),
        ("workers", workers, 1, 1024),
    ):
        if not low <= value <= high:
            raise Refusal("SYNTHETIC_RANGE", f"{what}={value} is outside {low}..{high}")


def run(preset: str, seeds: int, patients: int = 4000, workers: int = 1) -> dict[str, Any]:
    """Every oracle at every named site of a preset: {"sites": {site: {oracle: mean, sd, interval, values over seeds}}, ...}.

    The numbers do not depend on ``workers``. Raises Refusal: ``SYNTHETIC_UNKNOWN`` (preset), ``SYNTHETIC_RANGE`` (numbers).
    """
    check_range(patients, 10, seeds, workers)
    sites = list(pick(SITES, preset, "preset"))

    def one(seed: int) -> dict[str, dict[str, float]]:
        return {site: table(preset, site, patients, seed) for site in sites}

    rows = over_seeds(one, seeds, workers, "Oracles, seeds")
    found = {site: {name: summary([row[site][name] for row in rows]) for name in rows[0][site]} for site in sites}
    return {"preset": preset, "patients": patients, "seeds": seeds, "sites": found}
