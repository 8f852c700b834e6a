"""Paired bootstrap over the test users: how sure a difference between two methods is.

Users are drawn with replacement inside each fold, the same draw for both methods, all seeds and all tasks. A task's
value is the mean over folds and seeds of its metric on the drawn users; a gain is relative to the second method's value
(for metrics of which less is better, the share that is saved).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pcl_ext.metrics import higher_is_better

DRAWS = 2000
LEVEL = 0.95
Outputs = dict[str, np.ndarray]  # of one trial: "task/user", "task/value", "task/label"


@dataclass(frozen=True)
class Interval:
    """A relative gain, its bounds, and the share of draws above 0."""

    gain: float
    low: float
    high: float
    above: float

    @classmethod
    def of(cls, gain: float, drawn: np.ndarray) -> Interval:
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return cls(gain, float(low), float(high), float((drawn > 0).mean()))


def compare(ours: dict, others: dict, metric: dict[str, str], draws: int = DRAWS) -> dict[str, Interval]:
    """Intervals by task, and of their "mean".

    ours, others  {(fold, seed): Outputs}, the same keys; metric by task
    """
    if ours.keys() != others.keys():
        raise ValueError(f"both methods must have the same folds and seeds, got {sorted(ours)} and {sorted(others)}")
    gains, drawn = {}, {}
    weights = {fold: _draw(_users(ours, fold), draws, fold) for fold in {fold for fold, _ in ours}}
    for task, name in metric.items():
        own, other = (_values(method, task, name, weights) for method in (ours, others))
        with np.errstate(invalid="ignore", divide="ignore"):  # over nothing there is no relative gain
            ratio = own / other - 1.0
        drawn[task] = ratio if higher_is_better(name) else -ratio
        gains[task] = Interval.of(float(drawn[task][0]), drawn[task][1:])
    mean = np.mean(list(drawn.values()), axis=0)
    return gains | {"mean": Interval.of(float(mean[0]), mean[1:])}


def _users(method: dict, fold: str) -> np.ndarray:
    outputs = next(outputs for (own, _), outputs in method.items() if own == fold)
    return np.unique(np.concatenate([values for name, values in outputs.items() if name.endswith("/user")]))


def _draw(users: np.ndarray, draws: int, fold: str) -> tuple[np.ndarray, np.ndarray]:
    """(users, how often each is drawn [1 + draws, users]); row 0 is the sample itself."""
    generator = np.random.default_rng(sum(fold.encode()))
    counts = generator.multinomial(len(users), np.full(len(users), 1 / len(users)), size=draws)
    return users, np.vstack([np.ones((1, len(users)), counts.dtype), counts]).astype(np.float64)


def _values(method: dict, task: str, metric: str, weights: dict) -> np.ndarray:
    """[1 + draws], the mean over folds and seeds."""
    found = []
    for (fold, _), outputs in method.items():
        users, counts = weights[fold]
        own = counts[:, np.searchsorted(users, outputs[f"{task}/user"])]
        found.append(weighted(metric, outputs[f"{task}/value"], outputs[f"{task}/label"], own))
    return np.mean(found, axis=0)


def weighted(metric: str, value: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A metric of m targets with weights [draws, m] -> [draws].

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
        raise ValueError("macro_f1 has no interval here; report accuracy, or add it")
    return _mean(value, weights)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values.astype(np.float64) / weights.sum(1)


def _hits(value: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 / t where the label is among the t best classes."""
    if value.ndim == 1:
        value = np.stack([np.zeros_like(value), value], 1)
    best = value == value.max(1, keepdims=True)
    return best[np.arange(len(label)), label.astype(np.int64)] / best.sum(1)


def _auc(value: np.ndarray, label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of (positive, negative) pairs in the right order, ties a half."""
    order = np.argsort(value, kind="stable")
    value, label, weights = value[order], label[order] > 0, weights[:, order]
    starts = np.flatnonzero(np.r_[True, value[1:] != value[:-1]])
    positive = np.add.reduceat(weights * label, starts, axis=1)
    negative = np.add.reduceat(weights * ~label, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.where(pairs > 0, (positive * below).sum(1) / np.maximum(pairs, 1e-12), 0.5)
