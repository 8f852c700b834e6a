"""Paired bootstrap over the test users: how sure a difference between two methods is.

Users are drawn with replacement inside each fold, the same draw for both methods, all seeds and all tasks. A task's
value is the mean over folds and seeds of its metric on the drawn users; a gain is relative to the second method's value
(for metrics of which less is better, the share that is saved). A draw in which some task has no value, of an AUC with
one class alone for one, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from pcl_ext.metrics import higher_is_better

DRAWS = 2000
LEVEL = 0.95
_MOST_COUNTS = 1 << 24  # of draws x users held at a time
Outputs = dict[str, np.ndarray]  # of one trial: "task/user", "task/value", "task/label"


@dataclass(frozen=True)
class Interval:
    """A relative gain and its bounds, NaN where no draw has a value."""

    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.gain:+.1f} %\n{100 * self.low:+.1f} to {100 * self.high:+.1f}"

    @classmethod
    def of(cls, gain: float, drawn: np.ndarray) -> Interval:
        tail, known = (1 - LEVEL) / 2, drawn[~np.isnan(drawn)]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (np.nan, np.nan)
        return cls(gain, float(low), float(high))


def compare(ours: dict, others: dict, metric: dict[str, str], draws: int = DRAWS) -> dict[str, Interval]:
    """Intervals by task, and of their "mean".

    ours, others  {(fold, seed): Outputs}, the same keys; metric by task
    """
    if ours.keys() != others.keys():
        raise ValueError(f"both methods must have the same folds and seeds, got {sorted(ours)} and {sorted(others)}")
    parts = [
        [[_values(method, task, name, weights) for method in (ours, others)] for task, name in metric.items()]
        for weights in _draw({fold: _users(ours, fold) for fold in {fold for fold, _ in ours}}, draws)
    ]
    drawn = {}
    for (task, name), (own, other) in zip(metric.items(), np.concatenate(parts, axis=2)):
        with np.errstate(invalid="ignore", divide="ignore"):  # over nothing there is no relative gain
            ratio = own / other - 1.0
        drawn[task] = ratio if higher_is_better(name) else -ratio
    drawn["mean"] = np.mean(list(drawn.values()), axis=0)
    return {task: Interval.of(float(gain[0]), gain[1:]) for task, gain in drawn.items()}


def _users(method: dict, fold: str) -> np.ndarray:
    outputs = next(outputs for (own, _), outputs in method.items() if own == fold)
    return np.unique(np.concatenate([values for name, values in outputs.items() if name.endswith("/user")]))


def _draw(users: dict[str, np.ndarray], draws: int) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """users [n] by fold -> by fold (users, how often each is drawn [c, n] float64), some draws at a time: first the
    sample itself alone, then all `draws`. A fold's draws follow from its name."""
    yield {fold: (own, np.ones((1, len(own)))) for fold, own in users.items()}
    generators = {fold: np.random.default_rng(list(sha256(fold.encode()).digest())) for fold in users}
    each = max(1, _MOST_COUNTS // max(1, sum(map(len, users.values()))))
    for first in range(0, draws, each):
        size, counts = min(each, draws - first), {}
        for fold, own in users.items():
            drawn = generators[fold].multinomial(len(own), np.full(len(own), 1 / len(own)), size=size)
            counts[fold] = own, drawn.astype(np.float64)
        yield counts


def _values(method: dict, task: str, metric: str, weights: dict) -> np.ndarray:
    """[draws], the mean over folds and seeds."""
    found = []
    for (fold, _), outputs in method.items():
        users, counts = weights[fold]
        own = counts[:, np.searchsorted(users, outputs[f"{task}/user"])]
        found.append(weighted(metric, outputs[f"{task}/value"], outputs[f"{task}/label"], own))
    return np.mean(found, axis=0)


def weighted(metric: str, value: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A metric of m targets with weights [draws, m] -> [draws], NaN where it has no value.

    value [m]: the metric of each target where label is not read (items), a logit or value; [m, C]: logits of classes.
    """
    if metric == "auc":
        return _auc(value, label, weights)
    if metric == "accuracy":
        return _mean(_hits(value, label), weights)
    if metric == "log_loss":
        return _mean(np.logaddexp(0.0, np.where(label > 0, -value, value)), weights)
    if metric == "rmse":
        return np.sqrt(_mean((value - label) ** 2, weights))
    if metric == "mae":
        return _mean(np.abs(value - label), weights)
    if metric == "macro_f1":
        return _macro_f1(value, label, weights)
    return _mean(value, weights)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of nothing
        return weights @ values.astype(np.float64) / weights.sum(1)


def _predicted(value: np.ndarray) -> np.ndarray:
    """[m, C], 1 / t for each of the t best classes."""
    if value.ndim == 1:
        value = np.stack([np.zeros_like(value), value], 1)
    best = value == value.max(1, keepdims=True)
    return best / best.sum(1, keepdims=True)


def _hits(value: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 / t where the label is among the t best classes."""
    return _predicted(value)[np.arange(len(label)), label.astype(np.int64)]


def _macro_f1(value: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that are a target or a prediction somewhere."""
    predicted = _predicted(value)
    target = np.eye(predicted.shape[1])[label.astype(np.int64)]
    right, size = weights @ (predicted * target), weights @ (predicted + target)
    f1 = np.divide(2 * right, size, out=np.zeros_like(right), where=size > 0)
    with np.errstate(invalid="ignore"):  # of nothing
        return f1.sum(1) / (size > 0).sum(1)


def _auc(value: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of (positive, negative) pairs in the right order, ties a half; NaN with one class alone."""
    order = np.argsort(value, kind="stable")
    value, label, weights = value[order], label[order] > 0, weights[:, order]
    starts = np.flatnonzero(np.r_[True, value[1:] != value[:-1]])
    positive = np.add.reduceat(weights * label, starts, axis=1)
    negative = np.add.reduceat(weights * ~label, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.where(pairs > 0, (positive * below).sum(1) / np.maximum(pairs, 1e-12), np.nan)
