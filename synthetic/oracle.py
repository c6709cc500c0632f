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
from synthetic.world import MODALITIES, NODES, WEIGHTS, Preset, Site, Subjects, World, find_site

VIEWS: dict[str, tuple[str, ...]] = {"image": ("image",), "ehr": ("ehr",), "both": MODALITIES}


def log_odds(world: World, site: Site, theta: Array, modalities: tuple[str, ...]) -> Array:
    """log p(y=1 | theta) - log p(y=0 | theta) under ``site``'s law, [n].

    theta: [n, sum d], the measurements of ``modalities`` side by side.
    """
    preset: Preset = world.preset
    rows = {"image": np.arange(preset.d_image), "ehr": world.channels(site)}
    A = np.concatenate([world.A[m][rows[m]] for m in modalities])
    B = np.concatenate([world.B[m][rows[m]] for m in modalities])
    P, w, b = world.prior(site), world.w, B.sum(1)
    T = preset.tau**2 * np.eye(len(A)) + B @ B.T + (A * P) @ A.T
    gain = np.linalg.solve(T, np.stack([(A * P) @ w, b], axis=1)).T
    v = w @ (P * w) - ((A * P) @ w) @ gain[0]
    projected = by_row(gain, theta)
    step = site.rho * (gain[0] @ b)
    mean = preset.bias + projected[:, :1]
    nodes, log_weights = np.sqrt(v) * NODES, np.log(WEIGHTS)
    positive = logsumexp(log_weights + log_expit(mean - step + nodes), axis=1)
    negative = logsumexp(log_weights + log_expit(-(mean + step + nodes)), axis=1)
    return 2 * site.rho * projected[:, 1] + positive - negative


def env_bayes(world: World, site: Site, subjects: Subjects, view: str) -> Array:
    """The site's own optimum: above it (beyond noise) lies a leak."""
    return log_odds(world, site, subjects.theta_of(VIEWS[view]), VIEWS[view])


def c_blind(world: World, site: Site, subjects: Subjects, view: str) -> Array:
    """The optimum of one who holds that the care pathway says nothing of the label (rho = 0)."""
    return log_odds(world, replace(site, rho=0.0), subjects.theta_of(VIEWS[view]), VIEWS[view])


def source_bayes(world: World, subjects: Subjects, view: str) -> Array:
    """The internal site's optimum, applied wherever the subjects come from: training with unlimited labels."""
    return log_odds(world, world.internal, subjects.theta_of(VIEWS[view]), VIEWS[view])


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
