"""What can be done without external labels: a warning that a score leans on the care pathway, and heads that lean less."""

from dataclasses import replace

import numpy as np

from synthetic import arms
from synthetic.draws import Array, by_row, uniforms
from synthetic.presets import find_site
from synthetic.ranking import auc, decorrelating_weights, weighted_auc
from synthetic.world import MODALITIES, Subjects, World


def noisy_tag(subjects: Subjects, seed: int) -> Array:
    """A binary protocol tag that follows the care pathway, P(1) = sigm(1.5 c); [n] bool."""
    first, n = int(subjects.index[0]), len(subjects.index)
    return uniforms(seed, "noisy tag", first, n, 1)[:, 0] < 1 / (1 + np.exp(-1.5 * subjects.c.mean(1)))


def warning(preset: str, patients: int, seed: int) -> dict[str, dict[str, float]]:
    """What internal held-out subjects foretell: {arm: internal, decorrelated by c and by a noisy tag, unlinked, external}.

    ``unlinked`` is the AUC where the care pathway says nothing of the label (rho 0): internal less decorrelated foretells
    internal less unlinked.
    """
    world, external = World.named(preset, seed), find_site(preset, "external")
    n = world.preset.n_labelled
    weights = arms.train(world, world.internal, [n])[n]
    inside = world.sample(world.internal, arms.TEST, patients)
    y, scores = inside.label, arms.scores(inside, weights)
    found = {arm: {"internal": auc(y, score)} for arm, score in scores.items()}
    for name, tag in (("c", inside.c), ("tag", noisy_tag(inside, seed))):
        weight = decorrelating_weights(y, tag)
        for arm, score in scores.items():
            found[arm][f"decorrelated_{name}"] = weighted_auc(y, score, weight)
    for name, site in (("unlinked", replace(world.internal, rho=0.0)), ("external", external)):
        outside = world.sample(site, arms.TEST, patients)
        for arm, score in arms.scores(outside, weights).items():
            found[arm][name] = auc(outside.label, score)
    return found


def tag_direction(x: Array, tag: Array, label: Array | None = None) -> Array:
    """Unit vector [d] of the features' covariance with the tag; x [n, d], tag [n]; given the label [n] bool, within its classes.

    The label drives the care pathway, so that erasing the pathway without regard to the label takes label signal along.
    """
    x, tag = x - x.mean(0), tag - tag.mean()
    if label is not None:
        for of_class in (label, ~label):
            x[of_class] -= x[of_class].mean(0)
            tag[of_class] -= tag[of_class].mean()
    direction = tag @ x
    return direction / np.linalg.norm(direction)


def _erasing(x: Array, y: Array, direction: Array) -> Array:
    """Tuned ridge that is blind to one direction of the features; coefficients [d]."""
    blind = np.eye(len(direction)) - np.outer(direction, direction)
    return blind @ arms.tuned(x @ blind, y)


def heads(x: Array, y: Array, c: Array, tag: Array) -> dict[str, Array]:
    """Ways to fit a head, {name: coefficients [d]}; x [n, d] features, y [n] bool, c [n] the pathway, tag [n] its noisy proxy."""
    sd = x.std(0)
    z = x / sd
    found = {"plain": arms.tuned(z, y)}
    for name, by in (("c", c), ("noisy tag", tag)):
        weight = decorrelating_weights(y, by)
        found[f"weighted by {name}"] = arms.tuned(z, y, weight / weight.mean())
    found["erase tag given y"] = _erasing(z, y, tag_direction(z, tag.astype(float), y))
    found["erase c marginally"] = _erasing(z, y, tag_direction(z, c))
    return {name: coefficients / sd for name, coefficients in found.items()}


def mitigation(preset: str, patients: int, seed: int) -> dict[str, dict[str, float]]:
    """Heads that lean less on the pathway, on the measurements and on the JEPA code: {"arm, head": {site: AUC}}."""
    world, external = World.named(preset, seed), find_site(preset, "external")
    codes = arms.pretrain(world, world.internal)
    labelled = world.sample(world.internal, arms.LABELLED, world.preset.n_labelled)
    theta, tag = labelled.theta_of(MODALITIES), noisy_tag(labelled, seed)
    weights = {}
    for arm, encoder in (("fusion_tuned", np.eye(theta.shape[1])), ("jepa", codes.encoders["jepa"])):
        for head, coefficients in heads(by_row(encoder, theta), labelled.label, labelled.c.mean(1), tag).items():
            weights[f"{arm}, {head}"] = coefficients @ encoder
    found: dict[str, dict[str, float]] = {name: {} for name in weights}
    for site in (world.internal, external):
        subjects = world.sample(site, arms.TEST, patients)
        for name, score in arms.scores(subjects, weights).items():
            found[name][site.name] = auc(subjects.label, score)
    return found
