"""Exact Bayes scores of the label given the measurements: what no model can beat, and why a model might seem to.

Since c and z are Gaussian given the label, p(y, theta) is a Gaussian density times a one-dimensional logistic-normal
integral, taken with 40 Gauss-Hermite nodes. Scores are true log-odds. Rendered CTs and events are functions of theta and
label-free noise, so these scores bound every model on them too.
"""

from dataclasses import replace

import numpy as np
from scipy.special import log_expit, logsumexp
from scipy.stats import rankdata

from synthetic.draws import Array, by_row
from synthetic.presets import Site, find_site
from synthetic.world import MODALITIES, NODES, WEIGHTS, Subjects, World

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
    nodes, log_weights = np.sqrt(v) * NODES, np.log(WEIGHTS)
    scores = []
    for sign in (-1, 1):
        # the density around sign * rho * b, less what both signs share: + sign rho b'T^-1 x
        m = law.bias + w @ law.mean + projected[:, :1] - sign * site.rho * (gain[0] @ b)
        scores.append(
            sign * site.rho * projected[:, 1] + logsumexp(log_weights + log_expit(sign * (m + nodes)), axis=1)
        )
    return np.stack(scores, axis=1)


def log_odds(world: World, site: Site, theta: Array, modalities: tuple[str, ...]) -> Array:
    """log p(y=1 | theta) - log p(y=0 | theta) under ``site``'s law, [n]; theta as in ``log_joint``."""
    joint = log_joint(world, site, theta, modalities)
    return joint[:, 1] - joint[:, 0]


def score(world: World, site: Site, subjects: Subjects, view: str) -> Array:
    """``log_odds`` of a view for subjects of whom some may have no record: they are judged by what else there is, [n]."""
    found = log_odds(world, site, subjects.theta_of(VIEWS[view]), VIEWS[view])
    blind = ~subjects.seen_ehr
    if view != "image" and blind.any():
        instead = log_odds(world, site, subjects.theta["image"], ("image",)) if view == "both" else np.zeros(len(found))
        found[blind] = instead[blind]
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


def auc(y: Array, score: Array) -> float:
    """Area under the ROC curve; ties count one half."""
    positive = int(y.sum())
    ranks = rankdata(score)
    return float((ranks[y].sum() - positive * (positive + 1) / 2) / (positive * (len(y) - positive)))


def table(preset: str, site: str, patients: int, seed: int) -> dict[str, float]:
    """AUC of each oracle and view on ``patients`` fresh subjects, keys ``<oracle>_<view>``, and the prevalence."""
    world, law = World.named(preset, seed), find_site(preset, site)
    subjects = world.sample(law, 0, patients)
    result = {"prevalence": float(subjects.y.mean()), "causal_z": auc(subjects.y, subjects.eta)}
    for view in VIEWS:
        result[f"env_bayes_{view}"] = auc(subjects.y, env_bayes(world, law, subjects, view))
        result[f"source_bayes_{view}"] = auc(subjects.y, source_bayes(world, subjects, view))
        result[f"c_blind_{view}"] = auc(subjects.y, c_blind(world, law, subjects, view))
    return result
