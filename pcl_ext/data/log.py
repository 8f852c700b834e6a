"""An event log in memory: dense ids, each user's events in time order, histories and where they end."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.conditions import Condition, holds
from pcl_ext.data.config import EventsConfig, LogConfig, SubsetConfig
from pcl_ext.data.split import hash_modulo
from pcl_ext.data.times import TimeColumn

_LOG = logging.getLogger(__name__)
_ROWS = 1 << 20  # of a log that are sorted at a time
_KIND = {"int64": "integers", "string": "text"}


@dataclass
class Ids:
    """Distinct ids in rising order (`values`, arrow int64 or string) and the code of each row (int64)."""

    values: pa.Array
    codes: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_integer(self) -> bool:
        return pa.types.is_integer(self.values.type)

    def find(self, column: pa.ChunkedArray, where: str) -> np.ndarray:
        """Codes of the ids of another table, -1 where an id is not known here."""
        values, column = _of_one_type(self.values, _plain_ids(column, where), where)
        return pc.index_in(column, value_set=values).fill_null(-1).to_numpy().astype(np.int64)


def encode(columns: list[pa.ChunkedArray], names: list[str]) -> Ids:
    """The ids of the columns, one after the other, as codes. Raises ValueError for nulls and other types."""
    plain = [_plain_ids(column, name) for column, name in zip(columns, names, strict=True)]
    if len(plain) == 2:
        plain = _of_one_type(*plain, names[1])
    encoded = pa.chunked_array([c for column in plain for c in column.chunks], plain[0].type).dictionary_encode()
    encoded = encoded.combine_chunks()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return Ids(encoded.dictionary.take(pa.array(order)), rank[encoded.indices.to_numpy()])


def _plain_ids(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """int64 or string. Whole floats are integers: so pandas keeps a column that once had gaps."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        target = pa.int64()
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        target = pa.string()
    else:
        raise ValueError(f"{where} must hold integers or text, got {column.type}; `text` names columns to read as text")
    if column.null_count:
        raise ValueError(f"{where} must not be null, {column.null_count} of {len(column)} rows are")
    column = column.cast(kind)
    try:
        ids = column.cast(target)
    except pa.ArrowException as error:
        raise ValueError(f"{where} must be whole numbers of at most 63 bits, or text: {error}") from error
    if pa.types.is_floating(kind):
        exact = 2 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1)
        if (largest := pc.max(pc.abs(ids)).as_py() or 0) > exact:
            raise ValueError(f"{where} must be integers or text: {kind} is rounded beyond {exact:,}, got {largest:,}")
    return ids


def _of_one_type(ids: pa.Array | pa.ChunkedArray, others: pa.ChunkedArray, where: str) -> tuple:
    """Ids of [events] and of another table: both as text where one is integers and the other text."""
    if ids.type == others.type:
        return ids, others
    texts = ids.cast(pa.string()), others.cast(pa.string())
    what = f"{where} holds {_KIND[str(others.type)]} where [events] holds {_KIND[str(ids.type)]}"
    if len(others) and not pc.any(pc.is_in(texts[1], value_set=pc.unique(texts[0]))).as_py():
        raise ValueError(
            f"{what}, and as text none is the same: {others[0].as_py()!r} is not in [events], which has "
            f"{ids[0].as_py()!r}; write ids alike in all files, `text` keeps a column as its file writes it"
        )
    _LOG.info("%s: compared as text", what)
    return texts


class EventLog:
    """Events as codes, and which of them are histories.

    user, item  Ids; codes [E]          time   [E] int64, 0..E-1 where the log has no time column
    rank        [E] position of an event among all, by user, then time, then place in the file
    history     [H] events that make up the histories, by rank (all users back to back)
    users       [N] codes of the users that are kept, rising; offsets [N + 1] their events in `history`
    held_out    [all items] bool, items that some task keeps out of all inputs
    listed_items  codes of the rows of [items]
    row_of      [all users] row of a code in `users`, -1 for users left out
    """

    def __init__(self, config: LogConfig, events: pa.Table, items: pa.Table | None):
        names = config.events
        self._events = events = _without_empty(events, names)
        self.config, self._items = config, items
        self.user = encode([events[names.user]], ["[events] user"])
        columns, labels = [events[names.item]], ["[events] item"]
        if items is not None:
            columns, labels = [*columns, items[config.items.item]], [*labels, "[items] item"]
        self.item = encode(columns, labels)
        self.num_events = len(events)
        self.listed_items = self.item.codes[self.num_events :]  # of [items]
        self.item.codes = self.item.codes[: self.num_events]
        if len(np.unique(self.listed_items)) < len(self.listed_items):
            raise ValueError("[items] item must be unique, an id is there twice")
        self._times, self.time = None, np.arange(self.num_events)
        if names.time is not None:
            self._times = TimeColumn(events[names.time], names.time_unit, names.time_format, "[events] time")
            self.time = self._times.values
        order = np.lexsort((self.time, self.user.codes))
        self.rank = np.empty(self.num_events, np.int64)
        self.rank[order] = np.arange(self.num_events)
        self.held_out = self._held_out()
        self._select_histories(order)

    def bound(self, value, where: str) -> int | None:
        """A date or raw time of the TOML file in the unit of `time`."""
        if value is not None and self._times is None:
            raise ValueError(f"{where} needs [events] time")
        return None if value is None else self._times.bound(value, where)

    def mask(self, where: Iterable[Condition], label: str, start: int | None = None, until: int | None = None):
        """[E] bool: events that satisfy all conditions and have start <= time < until."""
        kept = np.ones(self.num_events, bool)
        for condition in where:
            kept &= self._holds(condition, label)
        if start is not None:
            kept &= self.time >= start
        if until is not None:
            kept &= self.time < until
        return kept

    def column(self, name: str, where: str) -> pa.ChunkedArray:
        if name not in self._events.column_names:
            raise ValueError(f"{where}: [events] has no column {name!r}")
        return self._events[name]

    def subset(self, subset: SubsetConfig, label: str) -> np.ndarray:
        """[all items] bool: the items of a task's subset."""
        kept = np.ones(len(self.item), bool)
        if subset.modulo is not None:
            name, ids = self.config.name, self.item.values.to_pylist()
            kept &= hash_modulo(name, "item", ids, subset.modulo) == subset.remainder
        for condition in subset.where:
            kept &= self._item_holds(condition, label)
        if not kept.any():
            raise ValueError(f"{label} must hold at least one item, got none")
        return kept

    def _holds(self, condition: Condition, label: str) -> np.ndarray:
        if condition.column in self._events.column_names:
            return holds(condition, self._events[condition.column], label).to_numpy(zero_copy_only=False)
        return self._item_holds(condition, label)[self.item.codes]

    def _item_holds(self, condition: Condition, label: str) -> np.ndarray:
        if self._items is None or condition.column not in self._items.column_names:
            raise ValueError(f"{label}: neither [events] nor [items] has a column {condition.column!r}")
        found = np.zeros(len(self.item), bool)
        found[self.listed_items] = holds(condition, self._items[condition.column], label).to_numpy(zero_copy_only=False)
        return found

    def _held_out(self) -> np.ndarray:
        held = np.zeros(len(self.item), bool)
        for task in self.config.tasks:
            if task.items is not None:
                held |= self.subset(task.items, f"task {task.name!r}: items")
        return held

    def _select_histories(self, order: np.ndarray) -> None:
        events = self.config.events
        self.until = self.bound(events.until, "[events] until")
        kept = np.ones(self.num_events, bool)
        for part, why in (
            (self.mask(events.where, "[events] where"), "which do not satisfy [events] where"),
            (self.mask((), "[events] until", until=self.until), f"not before [events] until, {events.until}"),
            (~self.held_out[self.item.codes], "of items that tasks keep out of all inputs"),
        ):
            _tell_left_out(int(kept.sum()), int((kept & part).sum()), why)
            kept &= part
        chosen = order[kept[order]]
        if events.distinct:
            first = first_of_pairs(self.user.codes[chosen], self.item.codes[chosen], len(self.item))
            _tell_left_out(len(chosen), len(first), "which repeat an item of their user ([events] distinct)")
            chosen = chosen[first]
        counts = np.bincount(self.user.codes[chosen], minlength=len(self.user))
        long_enough = counts >= max(1, events.min_length)
        if not long_enough.any():
            raise ValueError(
                f"[events]: no user has min_length = {events.min_length} events that satisfy where and until, "
                f"of {self.num_events} events in the log"
            )
        self.users = np.flatnonzero(long_enough)
        if left_out := len(self.user) - len(self.users):
            what = "left out: %d of %d users, whose histories have fewer than %d of the events that count"
            _LOG.info(what, left_out, len(self.user), max(1, events.min_length))
        self.row_of = np.full(len(self.user), -1)
        self.row_of[self.users] = np.arange(len(self.users))
        self.history = chosen[long_enough[self.user.codes[chosen]]]
        self.offsets = np.r_[0, np.cumsum(counts[self.users])]


def _tell_left_out(before: int, after: int, why: str) -> None:
    if after < before:
        _LOG.info("left out: %d of %d events, %s", before - after, before, why)


def _without_empty(events: pa.Table, names: EventsConfig) -> pa.Table:
    """Events with a user, an item and a time. Raises ValueError where some have none and are not to be skipped."""
    empty = {name: events[name].null_count for name in names.keys if events[name].null_count}
    if empty and not names.skip_empty:
        counts = ", ".join(f"{name!r} in {count:,}" for name, count in empty.items())
        raise ValueError(
            f"[events]: empty cells among {len(events):,} rows: {counts}; skip_empty = true leaves them out"
        )
    count = len(events)
    for name in empty:
        events = events.filter(pc.is_valid(events[name]))
    if empty:
        text = " or ".join(map(repr, empty))
        _tell_left_out(count, len(events), f"with an empty {text}")
    if not len(events):
        raise ValueError(f"[events]: {names.file} holds no events")
    return events


def first_of_pairs(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    """Positions, rising, of the first row of each (a, b); a never decreases, b is below `width`. Some rows at a time:
    sorting all at once would take several times their memory."""
    begin, found = 0, [np.empty(0, np.int64)]
    while begin < len(a):
        last = a[min(begin + _ROWS, len(a)) - 1]
        part = slice(begin, np.searchsorted(a, last, "right"))
        keys = a[part].astype(np.int64) * width + b[part]
        found.append(begin + np.sort(np.unique(keys, return_index=True)[1]))
        begin = part.stop
    return np.concatenate(found)
