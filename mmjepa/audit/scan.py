"""How well one column alone tells the classes apart, each subject counted once a class."""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.stats import hypergeom, norm, rankdata

from mmjepa.audit.events import NEVER, Events, Ranks
from mmjepa.keyed import generator

MIN_CLASS = 10  # subjects in the smaller class
SIGNIFICANT = 1e-3  # after multiplying by the number of features looked at
KINDS = ("first", "value", "low", "high", "count")
MAX_ROWS_A_SUBJECT, MAX_SUBJECTS, CHUNK = 8, 4_000, 256
DAY_US, HOUR_US = 86_400_000_000, 3_600_000_000


@dataclass(frozen=True)
class Rows:
    """Label rows of known subjects: subject [N] int64 index, t_us [N] int64, y [N] 0. or 1."""

    subject: np.ndarray
    t_us: np.ndarray
    y: np.ndarray

    def class_sizes(self) -> tuple[int, int]:
        """Subjects with a positive row, subjects with a negative row."""
        return len(np.unique(self.subject[self.y == 1])), len(np.unique(self.subject[self.y == 0]))

    def thinned(self) -> "Rows":
        """At most 4,000 subjects and 8 rows of each, chosen by key: a scan needs no more."""
        draw = generator(0, "audit/thin", len(self.y))
        order = draw.permutation(len(self.y))
        order = order[np.argsort(self.subject[order], kind="stable")]
        subject = self.subject[order]
        start = np.searchsorted(subject, subject)
        chosen = draw.permutation(np.unique(subject))[:MAX_SUBJECTS]
        keep = order[(np.arange(len(order)) - start < MAX_ROWS_A_SUBJECT) & np.isin(subject, chosen)]
        return Rows(self.subject[keep], self.t_us[keep], self.y[keep])


def grouped_auroc(table: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of each column and its two-sided p under no association (normal, ties count one half).

    table: [N, K]. A subject's rows of one class are averaged first, so that each subject counts once a class.
    """
    total, size, positive = _by_group(rows)
    ranks = rankdata(_rounded((total @ table) / size[:, None]), axis=0)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    auroc = (ranks[positive].sum(axis=0) - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return auroc, 2 * norm.sf(np.abs(auroc - 0.5) / null_error(n_positive, n_negative))


def _by_group(rows: Rows) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """A subject's rows of one class are a group. [G, N] sums over each; its rows [G]; whether it is of the positive class [G]."""
    groups, member = np.unique(rows.subject * 2 + rows.y.astype(np.int64), return_inverse=True)
    total = csr_array((np.ones(len(member)), (member, np.arange(len(member)))), shape=(len(groups), len(member)))
    return total, np.bincount(member), groups % 2 == 1


def _rounded(average: np.ndarray) -> np.ndarray:
    """To 40 binary digits (12 decimal ones): averages of equal numbers over groups of different sizes must tie."""
    mantissa, exponent = np.frexp(average)
    return np.ldexp(np.round(np.ldexp(mantissa, 40)), exponent - 40)


def fisher(a: np.ndarray, b: np.ndarray, n_a: int, n_b: int) -> np.ndarray:
    """Fisher's exact test, its smaller tail twice: a of n_a against b of n_b. [K] p."""
    law = hypergeom(n_a + n_b, a + b, n_a)
    return np.minimum(1, 2 * np.minimum(law.cdf(a), law.sf(a - 1)))


def null_error(n_positive: int, n_negative: int) -> float:
    """Standard error of an AUROC when nothing is associated (Mann-Whitney)."""
    return float(np.sqrt((n_positive + n_negative + 1) / (12 * n_positive * n_negative)))


def standard_error(auroc: float, n_positive: int, n_negative: int) -> float:
    """Standard error of an AUROC of that size (Hanley and McNeil 1982)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = (n_positive - 1) * (q1 - auroc**2) + (n_negative - 1) * (q2 - auroc**2)
    return float(np.sqrt((auroc * (1 - auroc) + spread) / (n_positive * n_negative)))


def scan(events: Events, rows: Rows) -> pd.DataFrame:
    """Presence and values of every code as of the prediction times. events: with the static rows.

    Columns: code, kind (presence; first, value for the last, low, high, count of those with values), auroc, p (NaN with fewer
    than 10 subjects a class), agrees (presence is the label, one to one), positives, negatives (subjects of either class with
    the code; NaN for values).
    """
    found = [_presence(events, rows), _values(events, rows)]
    return pd.concat(found, ignore_index=True)


def _presence(events: Events, rows: Rows) -> pd.DataFrame:
    subject, code, first = events.first_seen()
    here = np.isin(subject, rows.subject)
    subject, code, first = subject[here], code[here], first[here]
    enough = min(rows.class_sizes()) >= MIN_CLASS
    people, row_of = np.unique(rows.subject, return_inverse=True)
    total, _, positive = _by_group(rows)
    tables = []
    for start in range(0, len(events.vocabulary), CHUNK):
        low, high = np.searchsorted(code, [start, start + CHUNK])
        seen = np.full((len(people), CHUNK), NEVER)
        seen[np.searchsorted(people, subject[low:high]), code[low:high] - start] = first[low:high]
        present = seen[row_of] <= rows.t_us[:, None]
        varying = np.flatnonzero(present.any(axis=0) & ~present.all(axis=0))
        present = present[:, varying]
        auroc, p = grouped_auroc(present, rows) if enough and len(varying) else np.full((2, len(varying)), np.nan)
        match = present == (rows.y == 1)[:, None]
        have = (total @ present) > 0
        tables.append(
            pd.DataFrame(
                {
                    "code": events.vocabulary[start + varying],
                    "kind": "presence",
                    "auroc": auroc,
                    "p": p,
                    "agrees": match.all(axis=0) | ~match.any(axis=0),
                    "positives": have[positive].sum(axis=0),
                    "negatives": have[~positive].sum(axis=0),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _values(events: Events, rows: Rows) -> pd.DataFrame:
    with_value = np.flatnonzero(~np.isnan(events.values) & np.isin(events.subject, rows.subject))
    with_value = with_value[
        np.lexsort((events.available_us[with_value], events.subject[with_value], events.codes[with_value]))
    ]
    subject, codes = events.subject[with_value], events.codes[with_value]
    values = events.values[with_value].astype(float)
    ranks = Ranks(np.concatenate([events.available_us[with_value], rows.t_us]))
    keys, wanted = ranks.key(subject, events.available_us[with_value]), ranks.key(rows.subject, rows.t_us)
    found: list[tuple[str, str, float, float]] = []
    bounds = np.flatnonzero(np.diff(codes, prepend=-1, append=-1)) if len(codes) else np.zeros(0, np.int64)
    for low, high in itertools.pairwise(bounds):
        at = np.searchsorted(keys[low:high], wanted, side="right") - 1
        measured = (at >= 0) & (subject[low:high][at.clip(0)] == rows.subject)
        some = Rows(rows.subject[measured], rows.t_us[measured], rows.y[measured])
        if min(some.class_sizes()) >= MIN_CLASS:
            auroc, p = grouped_auroc(_so_far(subject[low:high], values[low:high])[at[measured]], some)
            name = str(events.vocabulary[codes[low]])
            found += [(name, kind, float(auroc[k]), float(p[k])) for k, kind in enumerate(KINDS)]
    table = pd.DataFrame(found, columns=["code", "kind", "auroc", "p"])
    return table.assign(agrees=False, positives=np.nan, negatives=np.nan)


def _so_far(subject: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n, 5]: first, last, least and greatest value and their count up to each row of its subject; rows sorted by subject."""
    start = np.searchsorted(subject, subject)
    known, rank = np.unique(values, return_inverse=True)
    step = subject * len(known)  # later subjects rank above all earlier ones, so that each starts its own maximum
    high = np.maximum.accumulate(step + rank) - step
    low = len(known) - 1 - (np.maximum.accumulate(step + len(known) - 1 - rank) - step)
    return np.stack([values[start], values, known[low], known[high], np.arange(len(values)) - start + 1], axis=1)


def record_size(events: Events, rows: Rows) -> np.ndarray:
    """[N, 5]: log counts of events, of distinct codes and of events of the last day; log hours since the first and the last."""
    order = np.lexsort((events.available_us, events.subject))
    subject, available_us = events.subject[order], events.available_us[order]
    first_subject, _, first_us = events.first_seen()
    ranks = Ranks(np.concatenate([available_us, rows.t_us, rows.t_us - DAY_US]))
    keys, new_keys = ranks.key(subject, available_us), np.sort(ranks.key(first_subject, first_us))
    now, day_ago = ranks.key(rows.subject, rows.t_us), ranks.key(rows.subject, rows.t_us - DAY_US)
    begin = np.searchsorted(subject, rows.subject)
    end = np.searchsorted(keys, now, side="right")
    some = end > begin
    safe_begin, safe_end = np.minimum(begin, len(order) - 1), np.maximum(end, 1) - 1
    columns = [
        end - begin,
        np.searchsorted(new_keys, now, side="right") - np.searchsorted(np.sort(first_subject), rows.subject),
        end - np.maximum(np.searchsorted(keys, day_ago, side="right"), begin),
        np.where(some, rows.t_us - available_us[safe_begin], 0) / HOUR_US,
        np.where(some, rows.t_us - available_us[safe_end], 0) / HOUR_US,
    ]
    return np.log1p(np.stack(columns, axis=1).astype(float))


def out_of_fold_scores(features: np.ndarray, rows: Rows) -> np.ndarray:
    """[N] scores of a logistic model over five folds by subject."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    return cross_val_predict(model, features, rows.y, groups=rows.subject, cv=folds, method="decision_function")
