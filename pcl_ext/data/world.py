"""The world of the synthetic data: clusters of items, tastes, and how tasks share the users' factors.

A user has SHARED factors that every task depends on and one factor for each task, all independent N(0, 1). Items
belong to clusters; a history draws clusters by the user's factors, items by popularity, and often goes on to the
cluster's next item. A task's score has variance 1, of which `shared` comes from the shared factors: with shared = 0
there is nothing to transfer, with shared = 1 all tasks are projections of the same SHARED numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from pcl_ext.task import TaskSpec

NAME = "synthetic"
SHARED = 2
TASKS = ("range", "click", "loyal", "segment", "spend")
CLASS_EDGES = (-0.7, 0.0, 0.7)
NOISE = {"segment": 0.3, "spend": 0.5}
STEEP, LOYAL_OFFSET = 3.0, 1.0
TASTE, RANGE_TASTE = 2.0, 2.5  # standard deviation of a cluster's log weight over the users
FOLLOW = 0.5  # how often the next event is the cluster's next item


@dataclass(frozen=True)
class World:
    """What all users have in common.

    taste    [F, C] log weights of the clusters by factor, F = SHARED + 5
    range    [SHARED + 1, C] the same for the held-out range
    mix      [5, SHARED] unit vectors: how each task's score uses the shared factors
    known    [C] items of a cluster that histories may hold; every fifth belongs to the range
    """

    num_items: int
    shared: float
    mean_length: int
    taste: np.ndarray
    range: np.ndarray
    mix: np.ndarray
    known: np.ndarray
    held: np.ndarray

    @property
    def num_clusters(self) -> int:
        return len(self.known)

    def known_id(self, cluster: np.ndarray, index: np.ndarray) -> np.ndarray:
        return (index + index // 4) * self.num_clusters + cluster + 1

    def held_id(self, cluster: np.ndarray, index: np.ndarray) -> np.ndarray:
        return (5 * index + 4) * self.num_clusters + cluster + 1


def make_world(num_items: int, mean_length: int, shared: float, seed: int) -> World:
    rng = np.random.default_rng([seed, 0])
    clusters = min(64, max(4, num_items // 20))
    factors = SHARED + len(TASKS)
    size = (num_items - np.arange(clusters) + clusters - 1) // clusters
    angle = np.pi * np.arange(len(TASKS)) / (2 * len(TASKS))  # all pairs of tasks agree, some more than others
    return World(
        num_items,
        shared,
        mean_length,
        taste=rng.standard_normal((factors, clusters)) * TASTE / np.sqrt(factors),
        range=rng.standard_normal((SHARED + 1, clusters)) * RANGE_TASTE / np.sqrt(SHARED + 1),
        mix=np.stack([np.cos(angle), np.sin(angle)], axis=1),
        known=size - size // 5,
        held=size // 5,
    )


def task_specs(world: World) -> dict[str, TaskSpec]:
    cluster = np.repeat(np.arange(world.num_clusters), world.held)
    index = np.concatenate([np.arange(count) for count in world.held])
    catalogue = tuple(np.sort(world.held_id(cluster, index)).tolist())
    make = {
        "range": partial(
            TaskSpec, kind="items", description="what the user picks from a new range", catalogue=catalogue
        ),
        "click": partial(TaskSpec, kind="binary", description="whether the user clicks an advertisement"),
        "loyal": partial(TaskSpec, kind="binary", description="whether the user stays for a year"),
        "segment": partial(
            TaskSpec,
            kind="classes",
            description="which of four segments the user is in",
            num_classes=len(CLASS_EDGES) + 1,
        ),
        "spend": partial(TaskSpec, kind="regression", description="how much the user spends"),
    }
    return {name: make[name](name) for name in TASKS}


def correlation(world: World) -> dict[str, dict[str, float]]:
    """Of the scores of each pair of tasks."""
    agree = world.shared * world.mix @ world.mix.T + (1 - world.shared) * np.eye(len(TASKS))
    return {a: {b: round(float(agree[i, j]), 4) for j, b in enumerate(TASKS)} for i, a in enumerate(TASKS)}


def cluster_weights(factors: np.ndarray, taste: np.ndarray) -> np.ndarray:
    """[n, C] probabilities of the clusters."""
    logits = factors @ taste
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def range_factors(world: World, factors: np.ndarray) -> np.ndarray:
    """[n, SHARED + 1]: what the range task depends on."""
    shared, own = factors[:, :SHARED], factors[:, SHARED : SHARED + 1]
    return np.hstack([shared * np.sqrt(world.shared), own * np.sqrt(1 - world.shared)])
