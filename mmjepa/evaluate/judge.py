"""Judging arms side by side: one draw of labelled subjects, one set of evaluated rows, one set of bootstrap draws."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmjepa.evaluate import metrics
from mmjepa.evaluate.bootstrap import SubjectBootstrap, benjamini_hochberg, difference, interval
from mmjepa.evaluate.collapse import collapse_panel
from mmjepa.evaluate.probe import LinearProbe
from mmjepa.evaluate.tables import (
    EmbeddingTable,
    ScoreTable,
    check_splits,
    join,
    read_embeddings,
    read_labels,
    read_scores,
)
from mmjepa.files import write_json
from mmjepa.keyed import generator
from mmjepa.refusal import Refusal

MEASURES = ("auroc", "auprc", "brier", "calibration_intercept", "calibration_slope")


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    name: short and stable. inside: embeddings of the development site, or ready scores.
    outside: the same of another site, or None. probe: what reads the embeddings (unused for scores).
    says: one line for people: what this arm is. oracle: it knows what no model can know; never ranked.
    """

    name: str
    inside: EmbeddingTable | ScoreTable
    outside: EmbeddingTable | ScoreTable | None = None
    probe: LinearProbe | None = None
    says: str = ""
    oracle: bool = False


def judge(
    arms: list[Arm],
    labels: pd.DataFrame,
    *,
    outside_labels: pd.DataFrame | None = None,
    reference: str | None = None,
    train_limit: int | None = None,
    seed: int = 0,
    draws: int = 2000,
    splits: pd.Series | None = None,
) -> dict[str, Any]:
    """Fit a probe on the labelled train and tuning subjects of each arm, score held_out and, once, the outside rows.

    labels, outside_labels: subject_id, prediction_time, value (boolean). splits: split by subject_id; default: the tables'
    own; where no table has one, 70/15/15 drawn by subject and said so. train_limit: number of labelled subjects the probes
    may see, the same for all arms. reference: the arm that the others are subtracted from (default: the first).
    Only rows that every arm has are used; what that costs is counted. The outside site tunes nothing.

    Returns plain values for JSON: ``train``, ``arms`` (name, learner, says, oracle), ``sites`` with, for ``inside`` and
    ``outside``: rows, subjects, positives, prevalence, excluded, trivial, and for each arm every measure with its interval,
    the paired AUROC difference from the reference with p and q, ROC points and calibration groups.
    Raises Refusal ``JUDGE_ARMS``, ``JUDGE_RANGE``, ``JUDGE_EMPTY``, ``PROBE_ONE_CLASS``, ``SPLIT_OVERLAP``.
    """
    if draws < 1 or (train_limit is not None and train_limit < 1):
        raise Refusal("JUDGE_RANGE", f"draws={draws} and train_limit={train_limit}", "Both are at least 1")
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) < len(names) or (reference is not None and reference not in names):
        raise Refusal(
            "JUDGE_ARMS", f"arms {names} with reference {reference!r}", "Want different names, one of them it"
        )
    for arm in arms:
        if outside_labels is not None and not _alike(arm.inside, arm.outside):
            raise Refusal("JUDGE_ARMS", f"arm '{arm.name}' has not the same kind of table, of one width, at both sites")
    reference = reference or names[0]
    rows, excluded = _common(arms, labels, "inside")
    split, split_rule = _splits(arms, rows, splits, seed)
    train, held_out = rows[np.isin(split, ("train", "tuning"))], rows[split == "held_out"]
    excluded["other_split"] = len(rows) - len(held_out)
    labelled = len(np.unique(train["subject_id"]))
    train = _limit(train, train_limit, seed)
    probes = [_fit(arm, train, seed) for arm in arms]
    bootstrap = {"draws": draws, "seed": seed}
    sites = {"inside": _site(arms, probes, held_out, excluded, reference, "inside", **bootstrap)}
    if outside_labels is not None:
        rows, excluded = _common(arms, outside_labels, "outside")
        sites["outside"] = _site(arms, probes, rows, excluded, reference, "outside", **bootstrap)
    _family(arms, sites, reference)
    return {
        "reference": reference,
        "seed": seed,
        "draws": draws,
        "interval": "95 %, bootstrap of whole subjects (for AUROC within ever-positive and never-positive)",
        "family": "AUROC differences from the reference, all arms but oracles, all sites; Benjamini-Hochberg",
        "split_rule": split_rule,
        "train": {**_counts(train), "labelled_subjects_available": labelled, "limit": train_limit},
        "arms": [
            {"name": arm.name, "learner": _learner(arm, probe), "says": arm.says, "oracle": arm.oracle}
            for arm, probe in zip(arms, probes, strict=True)
        ],
        "sites": sites,
    }


def evaluate_files(
    embeddings: Path | str,
    labels: Path | str,
    *,
    outside: Path | str | None = None,
    outside_labels: Path | str | None = None,
    oracle: Path | str | None = None,
    outside_oracle: Path | str | None = None,
    train_limit: int | None = None,
    seed: int = 0,
    draws: int = 2000,
    out: Path | str | None = None,
) -> dict[str, Any]:
    """``judge`` on files: one embedding table, read by a tuned and by an almost unpenalised probe; optionally an oracle.

    labels: the folder of one task. out: a JSON file to write the result to as well. The result of ``judge`` gains
    ``collapse``, the panel of the inside table with subjects as classes. Raises the Refusals of reading and of ``judge``,
    ``EVALUATE_OUTSIDE`` for half a site, ``OUTPUT_EXISTS``.
    """
    if out is not None and Path(out).exists():
        raise Refusal("OUTPUT_EXISTS", f"{out} already exists", "Name another file with out=")
    if (outside is None) != (outside_labels is None):
        raise Refusal("EVALUATE_OUTSIDE", "an outside site needs its embeddings and its labels", "Give both")
    if oracle is not None and (outside_oracle is None) != (outside is None):
        raise Refusal(
            "EVALUATE_OUTSIDE", "with an oracle, each site needs its own oracle scores", "Give both or neither"
        )
    inside_table = read_embeddings(embeddings)
    outside_table = None if outside is None else read_embeddings(outside)
    arms = [
        Arm("tuned", inside_table, outside_table, LinearProbe(seed=seed), "embeddings, tuned linear probe"),
        Arm("weak", inside_table, outside_table, LinearProbe(C=1e4), "the same embeddings, almost no penalty"),
    ]
    if oracle is not None:
        outside_scores = None if outside_oracle is None else read_scores(outside_oracle)
        arms.append(
            Arm("oracle", read_scores(oracle), outside_scores, says="knows the truth behind the data", oracle=True)
        )
    result = judge(
        arms,
        read_labels(labels),
        outside_labels=None if outside_labels is None else read_labels(outside_labels),
        train_limit=train_limit,
        seed=seed,
        draws=draws,
    )
    result["collapse"] = collapse_panel(inside_table.z, inside_table.subject_id, seed=seed)
    if out is not None:
        write_json(out, result)
    return result


def _alike(inside: EmbeddingTable | ScoreTable, outside: EmbeddingTable | ScoreTable | None) -> bool:
    if isinstance(inside, EmbeddingTable) and isinstance(outside, EmbeddingTable):
        return inside.z.shape[1] == outside.z.shape[1]
    return type(inside) is type(outside)


def _table(arm: Arm, site: str) -> EmbeddingTable | ScoreTable:
    table = arm.inside if site == "inside" else arm.outside
    assert table is not None  # judge refuses an arm without a table before anything is fitted
    return table


def _common(arms: list[Arm], labels: pd.DataFrame, site: str) -> tuple[pd.DataFrame, dict[str, int]]:
    """Labelled rows that every arm has: subject_id, prediction_time, y and, for each arm, its row number."""
    rows, excluded = None, {}
    for arm in arms:
        joined = join(_table(arm, site), labels)
        here = pd.Series(joined.row, index=joined.label_row, name=arm.name)
        rows = here.to_frame() if rows is None else rows.join(here, how="inner")
        excluded[f"labels_without_row:{arm.name}"] = joined.excluded["labels_without_row"]
        excluded["labels_without_value"] = joined.excluded["labels_without_value"]
    assert rows is not None
    labelled = labels.iloc[rows.index]
    keys = {
        "subject_id": labelled["subject_id"].to_numpy(),
        "y": labelled["value"].to_numpy(bool).astype(np.int8),
    }
    if rows.empty:
        raise Refusal("JUDGE_EMPTY", f"no labelled row of the {site} site is in every arm", "Check ids and times")
    return rows.assign(**keys).reset_index(drop=True), {key: n for key, n in excluded.items() if n}


def _splits(arms: list[Arm], rows: pd.DataFrame, splits: pd.Series | None, seed: int) -> tuple[np.ndarray, str]:
    """Split of every row, and where it comes from."""
    rule = "given with the labels"
    if splits is None:
        told = [arm.inside for arm in arms if isinstance(arm.inside, EmbeddingTable) and arm.inside.split is not None]
        if told:
            rule = "the tables' own"
            ids = np.concatenate([table.subject_id for table in told])
            splits = check_splits(ids, np.concatenate([np.asarray(table.split) for table in told]))
        else:
            rule = "none was given: 70/15/15 drawn by subject (the embeddings may have been trained on any of them)"
            ids = np.unique(rows["subject_id"])
            u = np.array([generator(seed, "split", int(subject)).random() for subject in ids])
            splits = pd.Series(np.select([u < 0.7, u < 0.85], ["train", "tuning"], "held_out"), index=ids)
    else:
        splits = check_splits(splits.index.to_numpy(), splits.to_numpy())
    split = splits.reindex(rows["subject_id"]).to_numpy()
    if pd.isna(split).any():
        raise Refusal(
            "TABLE_SPLIT", f"{int(pd.isna(split).sum())} labelled rows have no split", "Give every subject one"
        )
    return split, rule


def _limit(train: pd.DataFrame, limit: int | None, seed: int) -> pd.DataFrame:
    """Rows of ``limit`` subjects, chosen by a keyed draw of each subject's own."""
    if limit is None:
        return train
    subjects = np.unique(train["subject_id"])
    u = [generator(seed, "labelled", int(subject)).random() for subject in subjects]
    return train[train["subject_id"].isin(subjects[np.argsort(u)[:limit]])]


def _fit(arm: Arm, train: pd.DataFrame, seed: int) -> LinearProbe | None:
    if isinstance(arm.inside, ScoreTable):
        return None
    probe = arm.probe or LinearProbe(seed=seed)
    fresh = LinearProbe(**probe.get_params())
    if train["y"].nunique() < 2:
        raise Refusal("PROBE_ONE_CLASS", f"{len(train)} labelled training rows hold one class", "Label more subjects")
    return fresh.fit(arm.inside.z[train[arm.name]], train["y"].to_numpy(), train["subject_id"].to_numpy())


def _learner(arm: Arm, probe: LinearProbe | None) -> str:
    if probe is None:
        return "ready scores, nothing fitted"
    return probe.learner + (f"; chosen C = {probe.C_:g}" if probe.C is None else "")


def _counts(rows: pd.DataFrame) -> dict[str, Any]:
    positives = int(rows["y"].sum())
    return {
        "rows": len(rows),
        "subjects": rows["subject_id"].nunique(),
        "positives": positives,
        "prevalence": positives / len(rows) if len(rows) else None,
    }


def _site(
    arms: list[Arm],
    probes: list[LinearProbe | None],
    rows: pd.DataFrame,
    excluded: dict[str, int],
    reference: str,
    site: str,
    *,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    y = rows["y"].to_numpy()
    if len(np.unique(y)) < 2:
        raise Refusal(
            "JUDGE_EMPTY", f"the {len(y)} evaluated rows of the {site} site hold one class", "Nothing to rank"
        )
    subject = rows["subject_id"].to_numpy()
    stratified, plain = (SubjectBootstrap(subject, by, draws=draws, seed=seed) for by in (y, None))
    measured, drawn = {}, {}
    for arm, probe in zip(arms, probes, strict=True):
        log_odds = _score(_table(arm, site), probe, rows[arm.name].to_numpy())
        measured[arm.name], drawn[arm.name] = _measure(y, log_odds, stratified, plain)
    for name, values in measured.items():
        gap = values["auroc"]["value"] - measured[reference]["auroc"]["value"]
        values["auroc_difference"] = None if name == reference else difference(drawn[name], drawn[reference], gap)
    prevalence = float(y.mean())
    trivial = {"auroc": 0.5, "auprc": prevalence, "brier": prevalence * (1 - prevalence)}
    return {**_counts(rows), "excluded": excluded, "trivial": trivial, "arms": measured}


def _score(table: EmbeddingTable | ScoreTable, probe: LinearProbe | None, index: np.ndarray) -> np.ndarray:
    """Log-odds of the rows ``index``."""
    if isinstance(table, ScoreTable):
        return table.log_odds[index]
    assert probe is not None
    return probe.decision_function(table.z[index])


def _measure(
    y: np.ndarray, log_odds: np.ndarray, stratified: SubjectBootstrap, plain: SubjectBootstrap
) -> tuple[dict[str, Any], np.ndarray]:
    """Every measure of one arm at one site with its interval, and the AUROC of every draw.

    AUROC is drawn stratified. What depends on the prevalence is not: with the number of positives held, the interval of
    the calibration intercept is several times too narrow.
    """

    def ranking(weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        return (metrics.auroc(y, log_odds, weights),)

    def of_risks(weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        return (
            metrics.average_precision(y, log_odds, weights),
            metrics.brier(y, log_odds, weights),
            *metrics.calibration(y, log_odds, weights),
        )

    values = [float(value[0]) for value in (*ranking(None), *of_risks(None))]
    drawn = [*stratified(ranking), *plain(of_risks)]
    measured: dict[str, Any] = {
        name: {
            "value": value if np.isfinite(value) else None,
            "interval": interval(of_draw, logit=name in ("auroc", "auprc")) if np.isfinite(value) else None,
        }
        for name, value, of_draw in zip(MEASURES, values, drawn, strict=True)
    }
    false, true = metrics.roc_points(y, log_odds)
    measured["roc"] = {"false_positive_rate": false.tolist(), "true_positive_rate": true.tolist()}
    measured["calibration_groups"] = metrics.calibration_groups(y, log_odds)
    return measured, drawn[0]


def _family(arms: list[Arm], sites: dict[str, Any], reference: str) -> None:
    """Put q values beside the p values of the declared family."""
    family = [
        site["arms"][arm.name]["auroc_difference"]
        for site in sites.values()
        for arm in arms
        if not arm.oracle and arm.name != reference
    ]
    for member, q in zip(family, benjamini_hochberg([member["p"] for member in family]), strict=True):
        member["q"] = q
