"""`pcl prepare events`: any event log with a users table, described by a TOML file, becomes a dataset."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.check import check
from pcl_ext.data.coded import count_codes, gather, give_back, pieces
from pcl_ext.data.config import FoldConfig, LogConfig, TaskConfig, read_config
from pcl_ext.data.examples import user_chunks
from pcl_ext.data.item_table import earlier_items
from pcl_ext.data.labels import event_values, make_labels
from pcl_ext.data.log import EventLog
from pcl_ext.data.split import FOLDS, fold_of
from pcl_ext.data.tablefile import columns_of, files_of, read_table
from pcl_ext.data.targets import ItemTargets, item_targets
from pcl_ext.data.writer import DatasetWriter, check_out, source
from pcl_ext.progress import progress
from pcl_ext.task import TaskSpec

_LOG = logging.getLogger(__name__)
_USERS = 1 << 16
_EVENTS = 1 << 23


def prepare(config: str | Path, out: str | Path, *, rotate: int | None = None) -> None:
    """Read the TOML file `config` (see pcl_ext.data.config) and write the dataset `out`; the log is held in memory.

    rotate  replaces [fold] rotate
    Raises ValueError naming the key, the rule and what came, and leaves nothing behind.
    """
    config = read_config(config)
    check_out(out)
    folder = config.folder
    names = config.events
    earlier = None if names.item_ids is None else earlier_items(folder / names.item_ids)
    required = {names.user, names.item} | ({names.time} if names.time else set())
    _LOG.info("reading %s", names.file)
    events = columns_of(read_table(names, folder, "[events]", required, config.read_later))
    users = items = None
    if config.users is not None:
        wanted = {task.column for task in config.tasks if task.source == "users"} | {config.users.user}
        users = read_table(config.users, folder, "[users]", wanted)
    if config.items is not None:
        items = read_table(config.items, folder, "[items]", {config.items.item})
    tables = [part.file for part in (config.events, config.users, config.items) if part is not None]
    tables += [] if names.item_ids is None else [names.item_ids]
    sources = [source(file) for table in tables for file in files_of(folder / table)]
    build(config, out, events, users, items, rotate=rotate, sources=sources, earlier=earlier)


def build(
    config: LogConfig,
    out: str | Path,
    events: dict[str, pa.ChunkedArray],
    users: pa.Table | None = None,
    items: pa.Table | None = None,
    *,
    rotate: int | None = None,
    sources: list[dict] | None = None,
    earlier: pa.Array | None = None,
) -> None:
    """The dataset of tables that are in memory; columns leave `events` once they are done with, to make room. Item ids
    1..V are in the order of the log's ids, which items.parquet keeps, after those that `earlier` names; so are user
    ids, with users.parquet, where the log's are text."""
    check_out(out)
    if not config.events.time:
        _LOG.info("[events] time is left out: events keep the order of the file")
    _LOG.info("sorting %s events", f"{len(events[config.events.user]):,}")
    log = EventLog(config, events, items)
    fold = _folds(log, rotate)
    users = _kept_users(log, users) if any(task.source == "users" for task in config.tasks) else None
    if items is not None:
        unlisted = np.ones(len(log.item), bool)
        unlisted[log.listed_items] = False
        _tell_some("[items]: %d of %d items of the log have no row", unlisted[_occur(log.item.codes, log)])
    targets = {task.name: item_targets(log, task) for task in config.tasks if task.kind == "items"}
    item_ids, item_names = _item_ids(log, targets, items is not None, earlier)
    user_ids, names = _user_ids(log)
    with DatasetWriter(out, config.name, len(item_names), check=check) as writer:
        writer.header |= {"distinct": config.events.distinct, "sources": sources or []}
        writer.items(np.arange(1, len(item_names) + 1), item_names)
        if not log.user.is_integer:
            writer.users(user_ids, names)
        _write_histories(writer, log, item_ids, user_ids, fold)
        for task in config.tasks:
            if task.kind == "items":
                _write_items_task(writer, task, targets[task.name], item_ids, user_ids)
            else:
                _write_label_task(writer, task, log, users, user_ids, fold)
        del log, targets, users  # the checker needs none of them
        give_back()


def _folds(log: EventLog, rotate: int | None) -> np.ndarray:
    """[N] uint8; says how many users each fold has."""
    fold = _split(log, rotate)
    counts = np.bincount(fold, minlength=len(FOLDS)).tolist()
    _LOG.info("users: %s", ", ".join(f"{name} {count:,}" for name, count in zip(FOLDS, counts, strict=True)))
    if empty := [name for name, count in zip(FOLDS, counts, strict=True) if not count]:
        ways = '[fold] rotate or --rotate 0 to 4, by = "date", or another `name`'
        if log.config.fold.by == "date":
            ways = "other dates [fold] valid and test: a user arrives with the first event of the history"
        _LOG.info("no %s users: to train on this dataset give it some by %s", " and no ".join(empty), ways)
    return fold


def _split(log: EventLog, rotate: int | None) -> np.ndarray:
    config: FoldConfig = log.config.fold
    rotate = config.rotate if rotate is None else rotate
    if config.by == "hash":
        if config.valid is not None or config.test is not None:
            raise ValueError('[fold]: valid and test are dates for by = "date"')
        ids = log.user.values.take(pa.array(log.users))
        each = (user for piece in pieces(len(ids), _USERS) for user in ids[piece].to_pylist())
        return fold_of(log.config.name, each, rotate)
    if config.by != "date":
        raise ValueError(f"[fold]: by must be hash or date, got {config.by!r}")
    if rotate is not None or config.valid is None or config.test is None:
        raise ValueError('[fold]: by = "date" needs the dates valid and test, and no rotate')
    valid, test = log.bound(config.valid, "[fold] valid"), log.bound(config.test, "[fold] test")
    if valid > test:
        raise ValueError(f"[fold]: valid must not be after test, got {config.valid} and {config.test}")
    first = log.time[log.history[log.offsets[:-1]]]
    fold = ((first >= valid).astype(np.uint8) + (first >= test)).astype(np.uint8)
    learned = np.repeat(fold == 0, np.diff(log.offsets))
    if late := np.count_nonzero(learned & gather(log.time >= test, log.history)):
        what = "[fold] by date: %d of %d events of train users are not before test, %s: histories run on past it"
        _LOG.info(what, late, learned.sum(), config.test)
    return fold


def _item_ids(
    log: EventLog, targets: dict[str, ItemTargets], all_items: bool, earlier: pa.Array | None
) -> tuple[np.ndarray, pa.Array]:
    """Ids 1..V by code, 0 for codes without one, [all items] int32; what the log calls the items 1..V, texts."""
    known = _occur(log.item.codes[log.shown], log)
    for rows in targets.values():
        known[rows.item] = True
        if rows.catalogue is not None:
            known |= rows.catalogue & _occur(log.item.codes, log)
    if all_items:
        known[log.listed_items] = True
    texts = log.item.values.cast(pa.large_string())
    earlier = pa.array([], pa.large_string()) if earlier is None else earlier
    kept = pc.index_in(texts, value_set=earlier).fill_null(-1).to_numpy() + 1
    new = known & (kept == 0)
    if len(earlier):
        if not (kept > 0).any():
            raise ValueError(f"[events] item_ids: none of its {len(earlier)} items, as {earlier[0]}, is in the log")
        gone = len(earlier) - int((kept > 0).sum())
        _LOG.info(
            "[events] item_ids: %d items keep their ids, %d of them not in the log; %d are new",
            len(earlier),
            gone,
            new.sum(),
        )
    names = pa.concat_arrays([earlier, texts.filter(pa.array(new))])
    return np.where(new, len(earlier) + np.cumsum(new), kept).astype(np.int32), names


def _occur(items: np.ndarray, log: EventLog) -> np.ndarray:
    """[all items] bool: those whose code is there."""
    return count_codes(items, len(log.item)) > 0


def _user_ids(log: EventLog) -> tuple[np.ndarray, pa.Array]:
    """Ids of the kept users, and what the log calls them."""
    names = log.user.values.take(pa.array(log.users))
    return names.to_numpy() if log.user.is_integer else np.arange(1, len(names) + 1), names


def _write_histories(writer: DatasetWriter, log: EventLog, item_ids, user_ids, fold) -> None:
    with progress("writing histories", len(log.users)) as bar:
        for start, end in user_chunks(log.offsets, _EVENTS, _USERS):
            chosen = log.history[log.offsets[start] : log.offsets[end]]
            offsets = log.offsets[start : end + 1] - log.offsets[start]
            times = gather(log.time, chosen) if log.config.events.time else None
            items = gather(item_ids, gather(log.item.codes, chosen))
            writer.histories(user_ids[start:end], items, offsets, fold[start:end], times)
            bar.update(end - start)


def _write_items_task(writer: DatasetWriter, task: TaskConfig, rows: ItemTargets, item_ids, user_ids) -> None:
    catalogue = None if rows.catalogue is None else tuple(np.sort(item_ids[rows.catalogue & (item_ids > 0)]).tolist())
    spec = TaskSpec(task.name, "items", task.description, task.metric, catalogue=catalogue, repeats=task.repeats)
    writer.task(spec, user_ids[rows.user], item_ids[rows.item], rows.cut, rows.time)


def _write_label_task(writer: DatasetWriter, task: TaskConfig, log: EventLog, users, user_ids, fold) -> None:
    values = event_values(log, task) if task.source == "events" else users[task.column].combine_chunks()
    labels = make_labels(values, task, fold == 0)
    classes = len(labels.names) if task.kind == "classes" else None
    spec = TaskSpec(task.name, task.kind, task.description, task.metric, num_classes=classes, labels=labels.names)
    cut = (log.offsets[1:] - log.offsets[:-1])[labels.user]
    writer.task(spec, user_ids[labels.user], labels.target, cut)


def _kept_users(log: EventLog, users: pa.Table) -> pa.Table:
    """The users table with one row per kept user, nulls for users who are not in it. Says what does not match."""
    codes = log.user.find(users[log.config.users.user], "[users] user")
    row = np.full(len(log.user), -1)
    row[codes[codes >= 0]] = np.flatnonzero(codes >= 0)
    if len(np.unique(codes[codes >= 0])) < (codes >= 0).sum():
        twice = np.flatnonzero(np.bincount(codes[codes >= 0]) > 1)[0]
        raise ValueError(f"[users]: user must be unique, {log.user.values[twice].as_py()!r} is there twice")
    chosen = row[log.users]
    _tell_some("[users]: %d of %d users with a history have no row", chosen < 0)
    _tell_some("[users]: %d of %d rows are of no user of the log", codes < 0)
    return users.take(pa.array(chosen, mask=chosen < 0))


def _tell_some(what: str, rows: np.ndarray) -> None:
    if count := int(rows.sum()):
        _LOG.info(what, count, len(rows))
