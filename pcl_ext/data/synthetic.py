"""`pcl prepare synthetic`: users whose latent factors drive their histories and, partly shared, all tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcl_ext.data.check import check
from pcl_ext.data.oracle import Oracle
from pcl_ext.data.split import fold_of
from pcl_ext.data.world import (
    CLASS_EDGES,
    FOLLOW,
    LOYAL_OFFSET,
    NAME,
    NOISE,
    SHARED,
    STEEP,
    World,
    cluster_weights,
    correlation,
    make_world,
    range_factors,
    task_specs,
)
from pcl_ext.data.writer import DatasetWriter
from pcl_ext.progress import progress

_CHUNK = 1 << 14


@dataclass(frozen=True)
class Users:
    """One chunk: ids [n], factors [n, F], scores [n, 5], histories, fold, and targets by task (row, target)."""

    ids: np.ndarray
    factors: np.ndarray
    scores: np.ndarray
    items: np.ndarray
    offsets: np.ndarray
    fold: np.ndarray
    targets: dict[str, tuple[np.ndarray, np.ndarray]]


def prepare(
    out: str | Path,
    *,
    num_users: int = 3000,
    num_items: int = 500,
    mean_length: int = 30,
    shared: float = 0.8,
    seed: int = 0,
    rotate: int | None = None,
) -> None:
    """Write a dataset of `num_users` users, chunk by chunk in constant memory; the same arguments, the same bits.

    Five tasks besides next: range (items never in an input), click and loyal (binary), segment (4 classes), spend
    (regression). dataset.json keeps the arguments, the correlation of the tasks' scores, and the test metrics of an
    oracle that knows every user's factors.
    """
    _check_whole("num_users", num_users, 1)
    _check_whole("num_items", num_items, 50)
    _check_whole("mean_length", mean_length, 5)
    if not 0 <= shared <= 1:
        raise ValueError(f"shared must be in 0..1, got {shared}")
    world = make_world(num_items, mean_length, shared, seed)
    specs, oracle = task_specs(world), Oracle(world)
    with DatasetWriter(out, NAME, num_items, check=check) as writer, progress("drawing", num_users) as bar:
        for users in generate(world, num_users, seed, rotate):
            writer.histories(users.ids, users.items, users.offsets, users.fold)
            lengths = np.diff(users.offsets)
            for name, (row, target) in users.targets.items():
                writer.task(specs[name], users.ids[row], target, lengths[row])
            oracle.add(users)
            bar.update(len(users.ids))
        made = {"num_users": num_users, "mean_length": mean_length, "shared": shared, "seed": seed}
        found = {"correlation": correlation(world), "oracle": oracle.metrics()}
        writer.header |= {"distinct": True, "synthetic": made | found}


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer from {least} up, got {value!r}")


def generate(world: World, num_users: int, seed: int, rotate: int | None) -> Iterator[Users]:
    """Users 1..num_users in chunks; a chunk does not depend on how many there are."""
    for start in range(0, num_users, _CHUNK):
        rng = np.random.default_rng([seed, 1, start])
        factors = rng.standard_normal((_CHUNK, len(world.taste)))
        items, offsets = _histories(world, factors, rng)
        count = min(_CHUNK, num_users - start)
        ids = np.arange(start + 1, start + count + 1)
        own = factors[:, SHARED:] * np.sqrt(1 - world.shared)
        scores = factors[:, :SHARED] @ world.mix.T * np.sqrt(world.shared) + own
        targets = {
            name: (row[row < count], target[row < count])
            for name, (row, target) in _targets(world, factors, scores, rng)
        }
        end = offsets[count]
        fold = fold_of(NAME, ids, rotate)
        yield Users(ids, factors[:count], scores[:count], items[:end], offsets[: count + 1], fold, targets)


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[n, count] columns drawn from the rows of weights [n, C]."""
    edges = np.cumsum(weights, axis=1)
    edges[:, -1] = 1
    row = np.arange(len(weights))[:, None]
    flat = (edges + row).ravel()
    draws = rng.random((len(weights), count)) * (1 - 1e-9)
    return (
        np.searchsorted(flat, (draws + row).ravel(), side="right").reshape(draws.shape) - row * weights.shape[1]
    ).clip(0, weights.shape[1] - 1)


def _popular(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An index below each size, P(i) = log((i + 2) / (i + 1)) / log(size + 1): close to Zipf's law."""
    return np.minimum((sizes + 1.0) ** rng.random(sizes.shape) - 1, sizes - 1).astype(np.int64)


def _histories(world: World, factors: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """items [t] and offsets [n + 1]: each item of a user once, where it came first."""
    most = 3 * world.mean_length
    count = len(factors)
    lengths = np.exp(rng.normal(np.log(world.mean_length), 0.5, count)).astype(np.int64).clip(5, most)
    cluster = _draw(cluster_weights(factors, world.taste), most, rng)
    index = _popular(world.known[cluster], rng)
    follows = rng.random(cluster.shape) < FOLLOW
    follows[:, 0] = False
    step = np.arange(most)
    fresh = np.maximum.accumulate(np.where(follows, 0, step), axis=1)  # the last event that was not a follow-up
    cluster, index = np.take_along_axis(cluster, fresh, 1), np.take_along_axis(index, fresh, 1)
    item = world.known_id(cluster, (index + step - fresh) % world.known[cluster])
    user = np.repeat(np.arange(count), lengths)
    item = item[step < lengths[:, None]]
    first = np.sort(np.unique(user * (world.num_items + 1) + item, return_index=True)[1])
    return item[first], np.r_[0, np.cumsum(np.bincount(user[first], minlength=count))]


def _targets(world: World, factors, scores, rng) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    everyone = np.arange(len(factors))
    cluster = _draw(cluster_weights(range_factors(world, factors), world.range), 3, rng)
    cluster = np.where(world.held[cluster] > 0, cluster, 0)
    picked = world.held_id(cluster, _popular(world.held[cluster], rng))
    keys = np.unique(everyone[:, None] * (world.num_items + 1) + picked)
    yield "range", (keys // (world.num_items + 1), keys % (world.num_items + 1))
    chance = 1 / (1 + np.exp(-STEEP * (scores[:, 1:3] - [0, LOYAL_OFFSET])))
    happens = rng.random(chance.shape) < chance
    yield "click", (everyone, happens[:, 0].astype(np.int64))
    yield "loyal", (everyone, happens[:, 1].astype(np.int64))
    noise = rng.standard_normal((len(factors), 2)) * [NOISE["segment"], NOISE["spend"]]
    yield "segment", (everyone, np.searchsorted(CLASS_EDGES, scores[:, 3] + noise[:, 0]))
    yield "spend", (everyone, scores[:, 4] + noise[:, 1])
