"""The leakage checker: proves every promise of the dataset format, chunk by chunk, or says which row breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pcl_ext.data.cache import cached, identity
from pcl_ext.data.dataset import Dataset
from pcl_ext.data.examples import user_chunks
from pcl_ext.data.histories import FILE
from pcl_ext.data.table import NEXT, TaskTable
from pcl_ext.progress import progress

_EVENTS = 1 << 21


def check(dataset: Dataset | str | Path) -> None:
    """Raise ValueError, naming file, rule, row and value, for the first promise that does not hold.

    Opening a dataset and its tables proves: types, no nulls or NaN, item ids in 1..V, one fold a user, unique and known
    users, cuts within the history, targets in range. Here: histories are oldest first, no item is there twice where
    dataset.json says `distinct` or tasks/next.json does not say `repeats`, an item target is not among the visible
    items (unless the task says `repeats`), and no time of a target is before the last visible event.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    for name in dataset.task_names:
        dataset.task(name)  # types and ranges of all tables before the long look at the histories
    for name in dataset.task_names:
        check_task(dataset, name)


def check_task(dataset: Dataset, name: str) -> None:
    """What `check` proves of the histories and of one task. What has passed is remembered in the dataset's cache, by
    the hashes of its contents, and not looked at again."""
    table, histories = dataset.task(name), dataset.sha256
    _once(dataset, "ordered", histories, lambda: _check_times_rise(dataset))
    if dataset.distinct:
        _once(dataset, "distinct", histories, lambda: _check_distinct(dataset, "dataset.json says distinct"))
    elif name == NEXT and not table.spec.repeats:  # every item of a history is a target of pretraining
        rule = "tasks/next.json does not say repeats"
        _once(dataset, "distinct", histories, lambda: _check_distinct(dataset, rule))
    if (dataset.path / "tasks" / f"{name}.parquet").exists():  # else derived: the last item, given those before it
        key = histories + dataset.task_sha256(name)
        _once(dataset, f"checked-{name}", key, lambda: _check_table(dataset, table))


def _once(dataset: Dataset, what: str, key: str, prove: Callable[[], None]) -> None:
    """A folder of the cache that holds nothing says that `prove` did not raise for this key."""
    cached(dataset.path, what, identity([], key), lambda out: prove())


def _check_table(dataset: Dataset, table: TaskTable) -> None:
    file = dataset.path / "tasks" / f"{table.spec.name}.parquet"
    if table.time is not None:
        _check_times(dataset, table, file)
    if table.spec.kind == "items" and not table.spec.repeats:
        _check_unseen(dataset, table, file)


def _check_times_rise(dataset: Dataset) -> None:
    if dataset.times is None:
        return
    for start, end, user in _checked_chunks(dataset, FILE):
        low, high = dataset.offsets[start], dataset.offsets[end]
        back = (np.diff(dataset.times[low:high]) < 0) & (user[1:] == user[:-1])
        if back.any():
            at = int(np.flatnonzero(back)[0]) + 1
            value, row = int(dataset.times[low + at]), start + int(user[at])
            raise ValueError(f"{dataset.path / FILE}: times must not decrease, got {value} in row {row}")


def _check_distinct(dataset: Dataset, rule: str) -> None:
    for start, end, user in _checked_chunks(dataset, FILE):
        keys = _keys(dataset, user, dataset.items[dataset.offsets[start] : dataset.offsets[end]])
        keys.sort()
        if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
            row, item = divmod(int(keys[twice[0]]), dataset.num_items + 1)
            text = f"{rule}, so items must not repeat, got {item} twice in row {start + row}"
            raise ValueError(f"{dataset.path / FILE}: {text}")


def _checked_chunks(dataset: Dataset, file: str):
    """(first user, end, which of these users each event belongs to) of all users, with a bar that names the file."""
    with progress(f"checking {file}", dataset.num_users) as bar:
        for start, end in user_chunks(dataset.offsets, _EVENTS):
            yield start, end, np.repeat(np.arange(end - start), np.diff(dataset.offsets[start : end + 1]))
            bar.update(end - start)


def _check_times(dataset: Dataset, table: TaskTable, file: Path) -> None:
    if dataset.times is None or not len(dataset.times):
        return
    for start in range(0, len(table), _EVENTS):
        piece = slice(start, start + _EVENTS)
        cut, time = table.cut[piece], table.time[piece]
        last = dataset.times[(dataset.offsets[table.user[piece]] + cut - 1).clip(min=0)]
        if (bad := np.flatnonzero((cut > 0) & (time < last))).size:
            at = int(bad[0])
            rule = f"time must not be before the last visible event, {int(last[at])}"
            raise ValueError(f"{file}: {rule}, got {int(time[at])} in row {start + at}")


def _check_unseen(dataset: Dataset, table: TaskTable, file: Path) -> None:
    """No target among items[:cut]: per chunk of users, the first position of each target is looked up."""
    order = None if _increasing(table.user) else np.argsort(table.user, kind="stable")
    users = table.user if order is None else table.user[order]
    for start, end, user in _checked_chunks(dataset, file.name):
        rows = np.arange(np.searchsorted(users, start), np.searchsorted(users, end))
        rows = rows if order is None else order[rows]
        if not len(rows):
            continue
        low, high = dataset.offsets[start], dataset.offsets[end]
        keys, first = np.unique(_keys(dataset, user, dataset.items[low:high]), return_index=True)
        wanted = _keys(dataset, table.user[rows] - start, table.target[rows])
        at = np.searchsorted(keys, wanted).clip(max=max(0, len(keys) - 1))
        found = keys[at] == wanted if len(keys) else np.zeros(len(rows), bool)
        position = low + first[at] - dataset.offsets[table.user[rows]] if len(keys) else at
        if (bad := np.flatnonzero(found & (position < table.cut[rows]))).size:
            at = int(bad[0])
            rule = f"target must not be among the first {int(table.cut[rows[at]])} items of the history"
            raise ValueError(f"{file}: {rule}, got {int(table.target[rows[at]])} in row {int(rows[at])}")


def _increasing(values: np.ndarray) -> bool:
    return all((np.diff(values[start : start + _EVENTS + 1]) >= 0).all() for start in range(0, len(values), _EVENTS))


def _keys(dataset: Dataset, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    return user.astype(np.int64) * (dataset.num_items + 1) + item
