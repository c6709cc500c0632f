"""Shift experiments in closed form: which arm wins, at which site, knob by knob, beside what was possible at all.

A setting is a preset, a site to train at, a site to be judged at and a number of labels. Settings share trained arms, test
subjects and oracles where they can, and all sites share their random numbers, so that rows differ by their knobs alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from synthetic import arms, oracle, safeguards
from synthetic.draws import Array, generator
from synthetic.presets import SITES, Preset, Site, find_preset, pick
from synthetic.ranking import auc, paired_difference, summary
from synthetic.world import MODALITIES, Subjects, World

FEW_LABELS = 200  # of the knob and structure tables
# one knob at a time at the site of judgement; a constant offset of c or of b is inert for linear arms, and shown to be
KNOBS: dict[str, tuple[float, ...]] = {
    "rho": (0.4, 0.0, -0.4),
    "code_shift": (0.15, 0.5),
    "ehr_missing": (0.3, 1.0),
    "noise_image": (2.0,),
    "spec": (1.4,),
    "bias_shift": (-2.0,),
    "w_u_ehr_factor": (-10.0, 10.0),
    "c_mean": (1.0,),
    "group_shift": (1.0,),
    "label_flip": (0.1,),
    "follow_up_days": (180,),
}
# one knob at a time at the training site
TRAINING: dict[str, tuple[float, ...]] = {
    "mispair": (0.25, 0.75),
    "unpaired": (0.75,),
    "ehr_missing": (0.3,),
    "label_flip": (0.2,),
    "follow_up_days": (180,),
}
# other worlds: changes of the preset, and of both sites
STRUCTURES: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "li2025": {
        "no shared biology": ({"a_s_image": 0.0, "w_u_image": 1.2}, {}),
        "redundant": ({"a_s_image": 0.7, "w_u_image": 0.2}, {}),
        "pathway not in the image": ({"a_c_image": 0.0}, {}),
        "no pathway link": ({}, {"rho": 0.0}),
        "irrelevant factors fill the code": ({"k_b": 6, "rank": 5}, {}),
    },
    "groups": {"groups do not matter": ({"w_b": 0.0}, {})},
    "base": {
        "large nuisance": ({"a_n": 2.5}, {}),
        "redundant": ({"a_s_image": 0.6, "w_u_image": 0.2, "w_u_ehr": 0.1}, {}),
    },
}
ORDERINGS = {
    "jepa > weak > image": ("jepa", "fusion_weak", "image"),
    "image > jepa": ("image", "jepa"),
    "tuned > jepa": ("fusion_tuned", "jepa"),
}
_SHUFFLES = 12  # a seed


@dataclass(frozen=True)
class Setting:
    """A row of a table: arms that learnt from ``n_labelled`` labels at ``train``, judged at ``test``.

    internal: the world's own site, which source-Bayes knows; ``train`` may be it with knobs turned.
    """

    table: str
    row: str
    preset: Preset
    internal: Site
    train: Site
    test: Site
    n_labelled: int


def settings(preset: str) -> list[Setting]:
    """Every row of the arms, knobs, training and structure tables of a preset; Refusal ``SYNTHETIC_UNKNOWN``."""
    world, sites = find_preset(preset), pick(SITES, preset, "preset")
    inside = sites["internal"]
    rows = [
        Setting("arms", f"{n} labels, {test.name}", world, inside, inside, test, n)
        for n in sorted({100, FEW_LABELS, world.n_labelled})
        for test in sites.values()
    ]
    rows.append(Setting("knobs", "internal", world, inside, inside, inside, FEW_LABELS))
    for knob, value in _each(KNOBS):
        test = _with(inside, knob, value)
        rows.append(Setting("knobs", f"{knob}={value:g}", world, inside, inside, test, FEW_LABELS))
    for knob, value in _each(TRAINING):
        train = _with(inside, knob, value)
        for test in sites.values():
            rows.append(Setting("training", f"{knob}={value:g}, {test.name}", world, inside, train, test, FEW_LABELS))
    n = FEW_LABELS if preset == "li2025" else world.n_labelled
    for name, (of_preset, of_sites) in STRUCTURES[preset].items():
        other = replace(world, **of_preset)
        inner, *outer = (replace(site, **of_sites) for site in sites.values())
        for test in (inner, *outer):
            rows.append(Setting("structure", f"{name}, {test.name}", other, inner, inner, test, n))
    return rows


def _each(knobs: dict[str, tuple[float, ...]]) -> list[tuple[str, float]]:
    return [(knob, value) for knob, values in knobs.items() for value in values]


def _with(site: Site, knob: str, value: float) -> Site:
    changed: dict[str, Any] = {knob: value}
    return replace(site, **changed)


def measure(rows: Sequence[Setting], patients: int, seed: int) -> list[dict[str, float]]:
    """One seed of every setting: AUCs of the arms (by name) and oracles (``<oracle>_<view>``) for the labels as recorded,
    and ``excess_<arm>``, ``excess_se_<arm>``: the arm's AUC less env-Bayes' of the same view, with its paired error.
    """
    found: list[dict[str, float]] = [{} for _ in rows]
    for preset, internal in dict.fromkeys((row.preset, row.internal) for row in rows):
        world = World(preset, internal, seed)
        here = {i: row for i, row in enumerate(rows) if (row.preset, row.internal) == (preset, internal)}
        sizes = sorted({row.n_labelled for row in here.values()})
        trained = {
            train: arms.train(world, train, sizes) for train in dict.fromkeys(row.train for row in here.values())
        }
        for test in dict.fromkeys(row.test for row in here.values()):
            subjects = world.sample(test, arms.TEST, patients)
            oracles = oracle.scores(world, test, subjects)
            possible = {name: auc(subjects.label, score) for name, score in oracles.items()}
            for i, row in here.items():
                if row.test == test:
                    found[i] = possible | _judged(subjects, trained[row.train][row.n_labelled], oracles)
    return found


def _judged(subjects: Subjects, weights: dict[str, Array], oracles: dict[str, Array]) -> dict[str, float]:
    found = {}
    for arm, score in arms.scores(subjects, weights).items():
        found[arm] = auc(subjects.label, score)
        best = oracles[f"env_bayes_{arms.ARM_VIEW[arm]}"]
        found[f"excess_{arm}"], found[f"excess_se_{arm}"] = paired_difference(subjects.label, score, best)
    return found


def shuffled(preset: str, patients: int, seed: int) -> dict[str, list[float]]:
    """Control: AUCs inside of arms that learnt from permuted labels, {arm: one a permutation}; 0.5 but for chance."""
    world = World.named(preset, seed)
    site, codes = world.internal, arms.pretrain(world, world.internal)
    labelled = world.sample(site, arms.LABELLED, FEW_LABELS)
    subjects = world.sample(site, arms.TEST, patients)
    draw, theta = generator(seed, "shuffled labels"), labelled.theta_of(MODALITIES)
    found: dict[str, list[float]] = {arm: [] for arm in arms.ARMS}
    for _ in range(_SHUFFLES):
        weights = arms.fit(world.preset, codes, theta, draw.permutation(labelled.label))
        for arm, score in arms.scores(subjects, weights).items():
            found[arm].append(auc(subjects.label, score))
    return found


def code(preset: str, patients: int, seed: int) -> dict[str, dict[str, float]]:
    """What the closed-form JEPA keeps: share of each block's variance inside, and the canonical correlations up to its rank."""
    world = World.named(preset, seed)
    codes = arms.pretrain(world, world.internal)
    r2 = arms.block_r2(world, world.sample(world.internal, arms.TEST, patients), codes.encoders["jepa"])
    leading = codes.canonical[: world.preset.rank].tolist()
    return {"R^2": r2, "canonical r": {str(i + 1): r for i, r in enumerate(leading)}}


def _suite(preset: str, rows: Sequence[Setting], patients: int, seed: int) -> dict[str, Any]:
    return {
        "rows": measure(rows, patients, seed),
        "shuffled": shuffled(preset, patients, seed),
        "code": code(preset, patients, seed),
        "warning": safeguards.warning(preset, patients, seed),
        "mitigation": safeguards.mitigation(preset, patients, seed),
    }


def run(preset: str, seeds: int, patients: int = 4000, workers: int = 1) -> dict[str, Any]:
    """The whole level-0 suite: every table, the shuffled control, the JEPA's code, the warning and the heads.

    Returns {"tables": {table: rows}, "shuffled": {arm: summary}, "code": {measure: {block: summary}}, "warning": {arm:
    {measure: summary}}, "mitigation": {head: {site: summary}}, "above_env_bayes": rows with an arm beyond what is possible (a
    leak), ...}. A row has ``arms`` and ``oracles`` as summaries over seeds, ``orderings`` as counts of seeds, and
    ``above_env_bayes``, the arms more than 3 standard errors above env-Bayes. No number depends on ``workers``.

    Raises Refusal: ``SYNTHETIC_UNKNOWN`` (preset), ``SYNTHETIC_RANGE`` (numbers).
    """
    oracle.check_range(patients, 100, seeds, workers)
    rows = settings(preset)
    found = oracle.over_seeds(partial(_suite, preset, rows, patients), seeds, workers, "Shift experiments, seeds")
    tables: dict[str, list[dict[str, Any]]] = {}
    for i, row in enumerate(rows):
        tables.setdefault(row.table, []).append(_aggregate(row, [seed["rows"][i] for seed in found]))
    return {
        "level": 0,
        "preset": preset,
        "seeds": seeds,
        "patients": patients,
        "tables": tables,
        "shuffled": {arm: summary([v for seed in found for v in seed["shuffled"][arm]]) for arm in arms.ARMS},
        **{part: _by_row([seed[part] for seed in found]) for part in ("code", "warning", "mitigation")},
        "above_env_bayes": [
            f"{t}: {row['row']}" for t, part in tables.items() for row in part if row["above_env_bayes"]
        ],
    }


def _by_row(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {row: {name: summary([seed[row][name] for seed in found]) for name in found[0][row]} for row in found[0]}


def _aggregate(row: Setting, found: list[dict[str, float]]) -> dict[str, Any]:
    """A row over its seeds."""
    above = []
    for arm in arms.ARMS:
        excess = np.mean([seed[f"excess_{arm}"] for seed in found])
        error = np.sqrt(sum(seed[f"excess_se_{arm}"] ** 2 for seed in found)) / len(found)
        if excess > 3 * error:
            above.append(arm)
    known = [name for name in found[0] if name not in arms.ARMS and not name.startswith("excess")]
    return {
        "row": row.row,
        "test": row.test.name,
        "n_labelled": row.n_labelled,
        "arms": {arm: summary([seed[arm] for seed in found]) for arm in arms.ARMS},
        "oracles": {name: summary([seed[name] for seed in found]) for name in known},
        "orderings": {name: sum(_falls(seed, order) for seed in found) for name, order in ORDERINGS.items()},
        "above_env_bayes": above,
    }


def _falls(found: dict[str, float], order: Sequence[str]) -> bool:
    return all(found[a] > found[b] for a, b in pairwise(order))


_SHORT = {
    "fusion_weak": "weak",
    "fusion_tuned": "tuned",
    "env_bayes_both": "env",
    "source_bayes_both": "source",
    "c_blind_both": "c-blind",
    "jepa > weak > image": "J>W>I",
    "image > jepa": "I>J",
    "tuned > jepa": "T>J",
}
_LEGEND = """\
arms: image, ehr alone; weak, tuned: both by ridge with a little and with a tuned penalty; jepa: canonical correlation; pca.
oracles of both modalities: env knows the site's law, source the internal one, c-blind takes the pathway to say nothing.
J>W>I, I>J, T>J: seeds in which jepa > weak > image, image > jepa, tuned > jepa.
knobs: trained inside, judged where that one knob is turned. training: a fault of the training data. structure: other worlds."""
_PARTS = {
    "warning": "inside; reweighted until c, or a noisy tag of it, says nothing of the label; where c says nothing; outside",
    "mitigation": "heads that lean less on the pathway, inside and outside",
}


def lines(result: dict[str, Any]) -> list[str]:
    """``run``'s result as text: one line a setting, means over seeds; orderings as seeds out of all."""
    shown = [f"{name}_both" for name in ("env_bayes", "source_bayes", "c_blind")]
    heads = [_SHORT.get(name, name) for name in (*arms.ARMS, *shown, *ORDERINGS)]
    text = [f"AUC at level 0, preset {result['preset']}, mean of {result['seeds']} seeds", _LEGEND]
    for table, rows in result["tables"].items():
        width = 2 + max(len(table) + 12, *(len(row["row"]) for row in rows))
        labels = {row["n_labelled"] for row in rows}
        name = f"{table}, {labels.pop()} labels" if len(labels) == 1 else table
        text += ["", f"{name:<{width}}" + "".join(f"{head:>8}" for head in heads)]
        for row in rows:
            means = [row["arms"][arm]["mean"] for arm in arms.ARMS] + [row["oracles"][name]["mean"] for name in shown]
            cells = [f"{mean:.3f}" for mean in means] + [f"{k}/{result['seeds']}" for k in row["orderings"].values()]
            marks = "  above env-Bayes: " + ", ".join(row["above_env_bayes"]) if row["above_env_bayes"] else ""
            text.append(f"{row['row']:<{width}}" + "".join(f"{cell:>8}" for cell in cells) + marks)
    for part, says in _PARTS.items():
        names = list(next(iter(result[part].values())))
        text += ["", f"{part}, {find_preset(result['preset']).n_labelled} labels: {says}"]
        text.append(" " * 38 + "".join(f"{name:>18}" for name in names))
        for row, found in result[part].items():
            text.append(f"{row:<38}" + "".join(f"{found[name]['mean']:>18.3f}" for name in names))
    singles = {f"JEPA code, {row}": found for row, found in result["code"].items()}
    singles["shuffled labels (0.5 but for chance)"] = result["shuffled"]
    text.append("")
    for row, found in singles.items():
        text.append(f"{row:<38}" + ", ".join(f"{name} {value['mean']:.3f}" for name, value in found.items()))
    return text
