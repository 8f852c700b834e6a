"""`pcl prepare events`: any event log with a users table, described by a TOML file, becomes a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pcl_ext.data._arrow import pa
from pcl_ext.data.check import check
from pcl_ext.data.config import FoldConfig, LogConfig, TaskConfig, read_config
from pcl_ext.data.labels import event_values, make_labels
from pcl_ext.data.log import EventLog
from pcl_ext.data.split import fold_of
from pcl_ext.data.tablefile import files_of, read_table
from pcl_ext.data.targets import ItemTargets, item_targets
from pcl_ext.data.writer import DatasetWriter, source
from pcl_ext.progress import progress
from pcl_ext.task import TaskSpec

_USERS = 1 << 16
_EVENTS = 1 << 23


def prepare(config: str | Path, out: str | Path, *, rotate: int | None = None) -> None:
    """Read the TOML file `config` (see pcl_ext.data.config) and write the dataset `out`; the log is held in memory.

    rotate  replaces [fold] rotate
    Raises ValueError naming the key, the rule and what came, and leaves nothing behind.
    """
    config = read_config(config)
    folder = config.folder
    names = config.events
    required = {names.user, names.item} | ({names.time} if names.time else set())
    optional = {condition.column for part in (names, *config.tasks) for condition in part.where}
    optional |= {task.column for task in config.tasks if task.source == "events"}
    events = read_table(names, folder, "[events]", required, optional)
    users = items = None
    if config.users is not None:
        wanted = {task.column for task in config.tasks if task.source == "users"} | {config.users.user}
        users = read_table(config.users, folder, "[users]", wanted)
    if config.items is not None:
        items = read_table(config.items, folder, "[items]", {config.items.item})
    tables = [part.file for part in (config.events, config.users, config.items) if part is not None]
    sources = [source(file) for table in tables for file in files_of(folder / table)]
    build(config, out, events, users, items, rotate=rotate, sources=sources)


def build(
    config: LogConfig,
    out: str | Path,
    events: pa.Table,
    users: pa.Table | None = None,
    items: pa.Table | None = None,
    *,
    rotate: int | None = None,
    sources: list[dict] | None = None,
) -> None:
    """The dataset of tables that are in memory. Item ids 1..V are in the order of the log's ids, which items.parquet
    keeps; so are user ids, with users.parquet, where the log's are text."""
    log = EventLog(config, events, items)
    fold = _folds(log, rotate)
    targets = {task.name: item_targets(log, task) for task in config.tasks if task.kind == "items"}
    item_ids, known = _item_ids(log, targets, items is not None)
    user_ids, names = _user_ids(log)
    with DatasetWriter(out, config.name, int(known.sum()), check=check) as writer:
        writer.header |= {"distinct": config.events.distinct, "sources": sources or []}
        writer.items(item_ids[known], [str(value) for value in log.item.values.filter(pa.array(known)).to_pylist()])
        if not log.user.is_integer:
            writer.users(user_ids, names)
        _write_histories(writer, log, item_ids, user_ids, fold)
        for task in config.tasks:
            if task.kind == "items":
                _write_items_task(writer, task, targets[task.name], item_ids, known, user_ids)
            else:
                _write_label_task(writer, task, log, users, user_ids, fold)


def _folds(log: EventLog, rotate: int | None) -> np.ndarray:
    config: FoldConfig = log.config.fold
    rotate = config.rotate if rotate is None else rotate
    if config.by == "hash":
        if config.valid is not None or config.test is not None:
            raise ValueError('[fold]: valid and test are dates for by = "date"')
        return fold_of(log.config.name, log.user.values.take(pa.array(log.users)).to_pylist(), rotate)
    if config.by != "date":
        raise ValueError(f"[fold]: by must be hash or date, got {config.by!r}")
    if rotate is not None or config.valid is None or config.test is None:
        raise ValueError('[fold]: by = "date" needs the dates valid and test, and no rotate')
    valid, test = log.bound(config.valid, "[fold] valid"), log.bound(config.test, "[fold] test")
    if valid > test:
        raise ValueError(f"[fold]: valid must not be after test, got {config.valid} and {config.test}")
    first = log.time[log.history[log.offsets[:-1]]]
    return ((first >= valid).astype(np.uint8) + (first >= test)).astype(np.uint8)


def _item_ids(log: EventLog, targets: dict[str, ItemTargets], all_items: bool) -> tuple[np.ndarray, np.ndarray]:
    """Dense ids 1..V by code [all items], and which codes have one [all items] bool."""
    known = np.zeros(len(log.item), bool)
    known[log.item.codes[log.history]] = True
    for rows in targets.values():
        known[rows.item] = True
        if rows.catalogue is not None:
            known[log.item.codes[rows.catalogue[log.item.codes]]] = True
    if all_items:
        known[log.listed_items] = True
    return np.cumsum(known), known


def _user_ids(log: EventLog) -> tuple[np.ndarray, list[str] | None]:
    values = log.user.values.take(pa.array(log.users))
    if log.user.is_integer:
        return values.to_numpy(), None
    return np.arange(1, len(values) + 1), values.to_pylist()


def _write_histories(writer: DatasetWriter, log: EventLog, item_ids, user_ids, fold) -> None:
    start, count = 0, len(log.users)
    with progress("writing histories", count) as bar:
        while start < count:
            most = int(np.searchsorted(log.offsets, log.offsets[start] + _EVENTS, side="right")) - 1
            end = min(count, start + _USERS, max(start + 1, most))
            chosen = log.history[log.offsets[start] : log.offsets[end]]
            offsets = log.offsets[start : end + 1] - log.offsets[start]
            times = log.time[chosen] if log.config.events.time else None
            items = item_ids[log.item.codes[chosen]]
            writer.histories(user_ids[start:end], items, offsets, fold[start:end], times)
            bar.update(end - start)
            start = end


def _write_items_task(writer: DatasetWriter, task: TaskConfig, rows: ItemTargets, item_ids, known, user_ids) -> None:
    catalogue = None if rows.catalogue is None else tuple(item_ids[rows.catalogue & known].tolist())
    spec = TaskSpec(task.name, "items", task.description, task.metric, catalogue=catalogue, repeats=task.repeats)
    writer.task(spec, user_ids[rows.user], item_ids[rows.item], rows.cut, rows.time)


def _write_label_task(writer: DatasetWriter, task: TaskConfig, log: EventLog, users, user_ids, fold) -> None:
    values = event_values(log, task) if task.source == "events" else _user_values(log, task, users)
    labels = make_labels(values, task, fold == 0)
    classes = len(labels.names) if task.kind == "classes" else None
    spec = TaskSpec(task.name, task.kind, task.description, task.metric, num_classes=classes, labels=labels.names)
    cut = (log.offsets[1:] - log.offsets[:-1])[labels.user]
    writer.task(spec, user_ids[labels.user], labels.target, cut)


def _user_values(log: EventLog, task: TaskConfig, users: pa.Table) -> pa.Array:
    """The task's column of the users table, one value per kept user; null for users who are not in it."""
    codes = log.user.find(users[log.config.users.user], "[users] user")
    row = np.full(len(log.user), -1)
    row[codes[codes >= 0]] = np.flatnonzero(codes >= 0)
    if len(np.unique(codes[codes >= 0])) < (codes >= 0).sum():
        twice = np.flatnonzero(np.bincount(codes[codes >= 0]) > 1)[0]
        raise ValueError(f"[users]: user must be unique, {log.user.values[twice].as_py()!r} is there twice")
    chosen = row[log.users]
    return users[task.column].combine_chunks().take(pa.array(chosen, mask=chosen < 0))
