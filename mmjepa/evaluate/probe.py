"""The linear probe: what a frozen embedding gives away to the simplest tuned reader."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from mmjepa.keyed import generator
from mmjepa.refusal import Refusal

PENALTIES = tuple(10.0**power for power in range(-8, 5))
FOLDS = 5


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Standardise on the rows it is fitted on, then L2 logistic regression; intercept not penalised.

    C: inverse penalty in scikit-learn's sense. None: chosen among 13 powers of ten 1e-8..1e4 by the log loss of 5 folds
    that keep a subject together and share positives evenly; among equals the strongest penalty.
    seed: decides the folds, by subject and not by row order.

    After ``fit``: ``coef_`` [1, D] and ``intercept_`` [1] in the units of X, ``C_``, ``cv_log_loss_`` [13] (tuned only).
    The solution is that of scikit-learn's ``LogisticRegression`` with ``StandardScaler`` (tested). It is found in the
    basis of principal components, where the curvature is almost diagonal and a few L-BFGS steps suffice.
    """

    def __init__(self, C: float | None = None, seed: int = 0) -> None:
        self.C = C
        self.seed = seed

    @property
    def learner(self) -> str:
        """What this is, in words a reader can check."""
        if self.C is None:
            return "logistic regression, L2 penalty tuned (13 values, 5 folds by subject, log loss)"
        return f"logistic regression, fixed C = {self.C:g}" + (
            " (almost no penalty, not tuned)" if self.C >= 1e3 else " (not tuned)"
        )

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None) -> "LinearProbe":
        """Fit on X [n, D], y [n] with two classes, groups [n] = subject of each row (default: every row its own).

        Raises Refusal ``PROBE_ONE_CLASS`` for fewer than two subjects of a class when the penalty is tuned.
        """
        X, y = check_X_y(X, y, dtype=np.float64)
        self.n_features_in_ = X.shape[1]
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise Refusal("PROBE_ONE_CLASS", f"the probe has {len(self.classes_)} classes to learn from, want 2")
        groups = np.arange(len(y)) if groups is None else np.asarray(groups)
        self.C_ = self.C if self.C is not None else self._tune(X, target, groups)
        weight, bias = _path(X, target, (*(C for C in PENALTIES if C < self.C_), self.C_))[-1]
        self.coef_, self.intercept_ = weight[None, :], np.array([bias])
        return self

    def _tune(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
        fold = subject_folds(groups, y, FOLDS, self.seed)
        loss = np.zeros(len(PENALTIES))
        for k in range(FOLDS):
            out = fold == k
            if len(np.unique(y[~out])) < 2:
                raise Refusal(
                    "PROBE_ONE_CLASS",
                    "too few subjects of one class to tune the probe by folds",
                    "Label more subjects or give a fixed C",
                )
            for i, (weight, bias) in enumerate(_path(X[~out], y[~out], PENALTIES)):
                margin = (2 * y[out] - 1) * (X[out] @ weight + bias)
                loss[i] += np.logaddexp(0, -margin).sum()
        self.cv_log_loss_ = loss / len(y)
        return PENALTIES[int(np.argmin(self.cv_log_loss_))]

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds [n] of the second class."""
        check_is_fitted(self)
        X = check_array(X, dtype=np.float64)
        if X.shape[1] != self.n_features_in_:
            raise Refusal("PROBE_WIDTH", f"{X.shape[1]} features given to a probe fitted on {self.n_features_in_}")
        return X @ self.coef_[0] + self.intercept_[0]

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probabilities [n, 2]."""
        p = expit(self.decision_function(X))
        return np.column_stack([1 - p, p])

    def predict(self, X: np.ndarray) -> np.ndarray:
        """The more probable class [n]."""
        return self.classes_[(self.decision_function(X) > 0).astype(int)]


def subject_folds(groups: np.ndarray, y: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold number [n]: subjects are dealt out one after another, ever-positive ones first, in a keyed order."""
    subjects, of_row = np.unique(groups, return_inverse=True)
    ever = np.zeros(len(subjects), bool)
    np.logical_or.at(ever, of_row, np.asarray(y, bool))
    shuffled = generator(seed, "probe-folds").permutation(len(subjects))
    dealt = shuffled[np.argsort(~ever[shuffled], kind="stable")]
    fold = np.empty(len(subjects), int)
    fold[dealt] = np.arange(len(subjects)) % folds
    return fold[of_row]


def _path(X: np.ndarray, y: np.ndarray, penalties: tuple[float, ...]) -> list[tuple[np.ndarray, float]]:
    """Weights [D] and bias, in the units of X, for rising C; each fit starts where the last one ended.

    Minimises mean log loss + ||w||^2 / (2 C n) over standardised features.
    """
    n = len(y)
    mean, scale = X.mean(axis=0), X.std(axis=0)
    scale[scale <= 1e-12 * np.maximum(1, np.abs(mean))] = np.inf  # a constant feature says nothing
    basis, values = _principal((X - mean) / scale)
    components = np.column_stack([((X - mean) / scale) @ basis, np.ones(n)])
    curvature = np.r_[values**2 / n, 1.0]
    sign = 2.0 * y - 1
    solution = np.zeros(components.shape[1])
    solution[-1] = np.log(y.mean() / (1 - y.mean()))
    path = []
    for C in penalties:
        ridge = np.r_[np.full(len(values), 1 / (C * n)), 0.0]
        p = expit(components @ solution)
        # rescaled so that the Hessian is close to the identity
        unit = 1 / np.sqrt(max(float(np.mean(p * (1 - p))), 1e-9) * curvature + ridge)

        def objective(t: np.ndarray, ridge: np.ndarray = ridge, unit: np.ndarray = unit) -> tuple[float, np.ndarray]:
            a = t * unit
            margin = sign * (components @ a)
            slope = components.T @ (-sign * expit(-margin)) / n + ridge * a
            return float(np.logaddexp(0, -margin).mean() + 0.5 * (ridge * a * a).sum()), slope * unit

        found = minimize(
            objective,
            solution / unit,
            jac=True,
            method="L-BFGS-B",
            options={"gtol": 1e-9, "ftol": 0, "maxiter": 2000},
        )
        solution = found.x * unit
        weight = (basis @ solution[:-1]) / scale
        path.append((weight, float(solution[-1] - weight @ mean)))
    return path


def _principal(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis [D, r] of the rows' space and its singular values [r]; the penalised solution lies in it."""
    n, width = X.shape
    small = X @ X.T if n < width else X.T @ X
    values, vectors = np.linalg.eigh(small)
    keep = values > max(values[-1], 0) * 1e-12
    singular = np.sqrt(values[keep])
    return (X.T @ vectors[:, keep] / singular if n < width else vectors[:, keep]), singular
