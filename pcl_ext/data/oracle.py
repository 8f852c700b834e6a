"""The score of a predictor that knows each synthetic user's factors: how far a user model could get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pcl_ext.data.world import CLASS_EDGES, FOLLOW, World, cluster_weights, range_factors

if TYPE_CHECKING:
    from pcl_ext.data.synthetic import Users

_MOST_USERS = 4000  # that are measured, of the test fold; one standard error is then below .01
_MOST_SCORES = 40_000_000  # fewer of them for a large catalogue


class Oracle:
    """Collects test users; `metrics` says how well their targets are predicted from their factors.

    range ranks by the generator's own probabilities, next by them up to the effect of dropped repeats; both MRR@5 over
    the task's whole catalogue. click, loyal: AUC of the score. segment: accuracy. spend: RMSE.
    """

    def __init__(self, world: World):
        self.world = world
        self.most = max(1, min(_MOST_USERS, _MOST_SCORES // world.num_items))
        self.count = 0
        self.values: dict[str, list[np.ndarray]] = {name: [] for name in ("next", "range", "click", "loyal")}
        self.values |= {"segment": [], "spend": []}

    def add(self, users: Users) -> None:
        rows = np.flatnonzero(users.fold == 2)[: self.most - self.count]
        if not len(rows):
            return
        self.count += len(rows)
        chosen = np.zeros(len(users.ids), bool)
        chosen[rows] = True
        targets = {name: (row[chosen[row]], target[chosen[row]]) for name, (row, target) in users.targets.items()}
        for name, column in (("click", 1), ("loyal", 2), ("segment", 3), ("spend", 4)):
            row, target = targets[name]
            self.values[name].append(np.stack([users.scores[row, column], target]))
        self.values["range"].append(self._range(users, *targets["range"]))
        self.values["next"].append(self._next(users, rows))

    def metrics(self) -> dict[str, dict[str, float]]:
        if not self.count:
            return {}
        joined = {name: np.concatenate(pieces, axis=-1) for name, pieces in self.values.items()}
        score, target = joined["segment"]
        found = {
            "next": {"mrr@5": joined["next"].mean()},
            "range": {"mrr@5": joined["range"].mean()},
            "click": {"auc": area(*joined["click"])},
            "loyal": {"auc": area(*joined["loyal"])},
            "segment": {"accuracy": (np.searchsorted(CLASS_EDGES, score) == target).mean()},
            "spend": {"rmse": np.sqrt(np.mean((joined["spend"][0] - joined["spend"][1]) ** 2))},
        }
        return {task: {key: round(float(value), 4) for key, value in values.items()} for task, values in found.items()}

    def _range(self, users: Users, row: np.ndarray, target: np.ndarray) -> np.ndarray:
        world = self.world
        weights = cluster_weights(range_factors(world, users.factors[row]), world.range)
        cluster = np.repeat(np.arange(world.num_clusters), world.held)
        index = np.concatenate([np.arange(count) for count in world.held])
        chance = np.log((index + 2) / (index + 1)) / np.log(world.held[cluster] + 1)
        scores = np.zeros((len(row), world.num_items + 1))
        scores[:, world.held_id(cluster, index)] = weights[:, cluster] * chance
        return reciprocal_rank(scores, target)

    def _next(self, users: Users, rows: np.ndarray) -> np.ndarray:
        world = self.world
        rows = rows[np.diff(users.offsets)[rows] >= 2]
        weights = cluster_weights(users.factors[rows], world.taste)
        cluster = np.repeat(np.arange(world.num_clusters), world.known)
        index = np.concatenate([np.arange(count) for count in world.known])
        ids = world.known_id(cluster, index)
        chance = np.log((index + 2) / (index + 1)) / np.log(world.known[cluster] + 1)
        following = np.zeros(world.num_items + 1, np.int64)
        following[ids] = world.known_id(cluster, (index + 1) % world.known[cluster])
        scores = np.zeros((len(rows), world.num_items + 1))
        scores[:, ids] = (1 - FOLLOW) * weights[:, cluster] * chance
        ends = users.offsets[rows + 1]
        scores[np.arange(len(rows)), following[users.items[ends - 2]]] += FOLLOW
        for i, (begin, end) in enumerate(zip(users.offsets[rows], ends, strict=True)):
            scores[i, users.items[begin : end - 1]] = 0  # a history holds an item once
        return reciprocal_rank(scores, users.items[ends - 1])


def reciprocal_rank(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[n] 1 / rank of the target where it is at most 5, else 0; ties are rare here and count as beaten."""
    own = np.take_along_axis(scores, target[:, None], 1)
    rank = (scores > own).sum(axis=1) + 1
    return np.where(rank <= 5, 1 / rank, 0)


def area(score: np.ndarray, target: np.ndarray) -> float:
    """Area under the ROC curve of distinct scores."""
    rank = np.empty(len(score))
    rank[np.argsort(score)] = np.arange(1, len(score) + 1)
    positives = int(target.sum())
    if positives in (0, len(target)):
        return float("nan")
    return (rank[target == 1].mean() - (positives + 1) / 2) / (len(target) - positives)
