"""The leakage checker: proves every promise of the dataset format, chunk by chunk, or says which row breaks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pcl_ext.data.dataset import Dataset
from pcl_ext.data.parquet import row_of
from pcl_ext.data.progress import progress
from pcl_ext.data.table import NEXT, TaskTable

_EVENTS = 1 << 21


def check(dataset: Dataset | str | Path) -> None:
    """Raise ValueError, naming file, rule, row and value, for the first promise that does not hold.

    Opening a dataset and its tables proves: types, no nulls or NaN, item ids in 1..V, one fold a user, unique and known
    users, cuts within the history, targets in range. Here: histories are oldest first, `distinct` is true where it is
    claimed, an item target is not among the visible items (unless the task says repeats), and no time of a target is
    before the last visible event.
    """
    dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    tables = {name: dataset.task(name) for name in dataset.task_names}
    _check_histories(dataset)
    for name, table in tables.items():
        file = dataset.path / "tasks" / f"{name}.parquet"
        if name == NEXT and not file.exists():
            continue  # derived: the last item, given those before it
        if table.time is not None:
            _check_times(dataset, table, file)
        if table.spec.kind == "items" and not table.spec.repeats:
            _check_unseen(dataset, table, file)


def user_chunks(dataset: Dataset):
    """(first user, end) ranges of about _EVENTS events each."""
    start = 0
    while start < dataset.num_users:
        limit = dataset.offsets[start] + _EVENTS
        end = max(start + 1, int(np.searchsorted(dataset.offsets, limit, side="right")) - 1)
        yield start, min(end, dataset.num_users)
        start = min(end, dataset.num_users)


def _check_histories(dataset: Dataset) -> None:
    file = dataset.path / "histories.parquet"
    bar = progress("checking histories", dataset.num_users)
    for start, end in user_chunks(dataset):
        low, high = dataset.offsets[start], dataset.offsets[end]
        lengths = np.diff(dataset.offsets[start : end + 1])
        user = np.repeat(np.arange(end - start), lengths)
        if dataset.times is not None:
            back = (np.diff(dataset.times[low:high]) < 0) & (user[1:] == user[:-1])
            if back.any():
                at = int(np.flatnonzero(back)[0]) + 1
                value = int(dataset.times[low + at])
                raise ValueError(f"{file}: times must not decrease, got {value} in row {start + row_of(lengths, at)}")
        if dataset.distinct:
            keys = _keys(dataset, user, dataset.items[low:high])
            keys.sort()
            if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
                row, item = divmod(int(keys[twice[0]]), dataset.num_items + 1)
                rule = "dataset.json says distinct, so items must not repeat"
                raise ValueError(f"{file}: {rule}, got {item} twice in row {start + row}")
        bar.update(end - start)
    bar.close()


def _check_times(dataset: Dataset, table: TaskTable, file: Path) -> None:
    if dataset.times is None:
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
    for start, end in user_chunks(dataset):
        rows = np.arange(np.searchsorted(users, start), np.searchsorted(users, end))
        rows = rows if order is None else order[rows]
        if not len(rows):
            continue
        low, high = dataset.offsets[start], dataset.offsets[end]
        user = np.repeat(np.arange(end - start), np.diff(dataset.offsets[start : end + 1]))
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
