"""An event log in memory: dense ids, each user's events in time order, histories and where they end."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.coded import can_code, coded, count_codes, gather, give_back, plain
from pcl_ext.data.conditions import Condition, holds
from pcl_ext.data.config import EventsConfig, LogConfig, SubsetConfig
from pcl_ext.data.split import hash_modulo
from pcl_ext.data.times import TimeColumn

_LOG = logging.getLogger(__name__)
_ROWS = 1 << 20  # of a log whose pairs are sorted at a time
MISSING = {"", "-", "?", "na", "n/a", "nan", "none", "null", "unknown"}  # lower case; words that often mean so
_KIND = {"int64": "integers", "string": "text"}


@dataclass
class Ids:
    """Distinct ids in rising order (`values`, arrow int64 or string) and the code of each row (int32)."""

    values: pa.Array
    codes: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_integer(self) -> bool:
        return pa.types.is_integer(self.values.type)

    def find(self, column: pa.ChunkedArray, where: str) -> np.ndarray:
        """Codes of the ids of another table, -1 where an id is not known here."""
        column = _coded(column, where)
        values, ids = _of_one_type(self.values, _plain_ids(column.dictionary, where), where)
        return pc.index_in(ids, value_set=values).fill_null(-1).take(column.indices).to_numpy()


def encode(columns: list[pa.ChunkedArray], names: list[str]) -> tuple[pa.Array, list[np.ndarray]]:
    """The ids of all columns in rising order (int64 or string), and the codes of each column, int32. Raises ValueError
    for nulls and other types."""
    columns = [_coded(column, name) for column, name in zip(columns, names, strict=True)]
    ids = [_plain_ids(column.dictionary, name) for column, name in zip(columns, names, strict=True)]
    if len(ids) == 2:
        ids = _of_one_type(*ids, names[1])
    joined = pa.concat_arrays(ids).dictionary_encode()
    order = pc.sort_indices(joined.dictionary)
    rank = np.empty(len(order), np.int32)
    rank[order.to_numpy()] = np.arange(len(order))
    codes = pa.array(rank).take(joined.indices)
    starts = np.cumsum([0, *map(len, ids)]).tolist()
    found = [codes[start:].take(column.indices).to_numpy() for start, column in zip(starts, columns, strict=False)]
    return joined.dictionary.take(order), found


def _coded(column: pa.ChunkedArray, where: str) -> pa.DictionaryArray:
    """Ids and a code of each row. A dictionary column is one that `coded` made."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not can_code(kind):
        raise ValueError(f"{where} must hold integers or text, got {kind}; `text` names columns to read as text")
    if column.null_count:
        raise ValueError(f"{where} must not be null, {column.null_count} of {len(column)} rows are")
    return (column if pa.types.is_dictionary(column.type) else coded(column)).chunk(0)


def _plain_ids(ids: pa.Array, where: str) -> pa.Array:
    """int64 or string. Whole floats are integers: so pandas keeps a column that once had gaps."""
    kind = ids.type
    try:
        ids = ids.cast(pa.int64() if pa.types.is_integer(kind) or pa.types.is_floating(kind) else pa.string())
    except pa.ArrowException as error:
        raise ValueError(f"{where} must be whole numbers of at most 63 bits, or text: {error}") from error
    if pa.types.is_floating(kind):
        exact = 2 ** (np.finfo(f"f{kind.bit_width // 8}").nmant + 1)
        if (largest := pc.max(pc.abs(ids)).as_py() or 0) > exact:
            raise ValueError(f"{where} must be integers or text: {kind} is rounded beyond {exact:,}, got {largest:,}")
    return ids


def _of_one_type(ids: pa.Array, others: pa.Array, where: str) -> tuple[pa.Array, pa.Array]:
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
    order       [E] all events, by user, then time, then place in the file
    shown       [E] bool, events that make up the histories
    history     [H] these events in that order (all users back to back)
    users       [N] codes of the users that are kept, rising; offsets [N + 1] their events in `history`
    held_out    [all items] bool, items that some task keeps out of all inputs
    listed_items  codes of the rows of [items]
    row_of      [all users] row of a code in `users`, -1 for users left out
    """

    def __init__(self, config: LogConfig, events: dict[str, pa.ChunkedArray], items: pa.Table | None):
        """Takes the columns out of `events` that nothing reads later, each as soon as it can."""
        names, self.config, self._items, self._events = config.events, config, items, events
        _leave_out_empty(events, names)
        self.num_events = len(events[names.user])
        values, codes = encode([events[names.user]], ["[events] user"])
        self.user = Ids(values, codes[0])
        columns, labels = [events[names.item]], ["[events] item"]
        if items is not None:
            columns, labels = [*columns, items[config.items.item]], [*labels, "[items] item"]
        values, codes = encode(columns, labels)
        self.item, self.listed_items = Ids(values, codes[0]), codes[1] if items is not None else np.empty(0, np.int32)
        del columns
        _tell_odd_ids(self.user, names.user)
        _tell_odd_ids(self.item, names.item)
        self._let_go({names.user, names.item} - {names.time})
        if (twice := np.bincount(self.listed_items) > 1).any():
            item = self.item.values[twice.argmax()].as_py()
            raise ValueError(f"[items] item must be unique, {item!r} is there twice")
        if names.time is None:
            self._times, self.time = None, np.arange(self.num_events)
        else:
            self._times = TimeColumn(events[names.time], names.time_unit, names.time_format, "[events] time")
            self.time = self._times.values
            self._let_go({names.time})
        order = np.lexsort((self.time, self.user.codes))
        self.order = order.astype(np.int32) if len(order) < 2**31 else order
        del order
        self.held_out = self._held_out()
        self._select_histories()

    def _let_go(self, names: set[str]) -> None:
        for name in names - self.config.read_later:
            del self._events[name]
        give_back()

    def ordered(self, kept: np.ndarray) -> np.ndarray:
        """The events of a mask [E], by user, then time, then place in the file."""
        return self.order if kept.all() else self.order[gather(kept, self.order)]

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
        if name not in self._events:
            raise ValueError(f"{where}: [events] has no column {name!r}")
        return plain(self._events[name])

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
        if condition.column in self._events:
            return holds(condition, self._events[condition.column], label).to_numpy(zero_copy_only=False)
        return gather(self._item_holds(condition, label), self.item.codes)

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

    def _select_histories(self) -> None:
        events = self.config.events
        self.until = self.bound(events.until, "[events] until")
        kept = np.ones(self.num_events, bool)
        for part, why in (
            (self.mask(events.where, "[events] where"), "which do not satisfy [events] where"),
            (self.mask((), "[events] until", until=self.until), f"not before [events] until, {events.until}"),
            (gather(~self.held_out, self.item.codes), "of items that tasks keep out of all inputs"),
        ):
            _tell_left_out(int(kept.sum()), int((kept & part).sum()), why)
            kept &= part
        if events.distinct:
            chosen = self.ordered(kept)
            user, item = gather(self.user.codes, chosen), gather(self.item.codes, chosen)
            first = first_of_pairs(user, item, len(self.item))
            _tell_left_out(len(first), int(first.sum()), "which repeat an item of their user ([events] distinct)")
            kept[chosen[~first]] = False
            del chosen, user, item, first
        counts = count_codes(self.user.codes[kept], len(self.user))
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
        self.shown = kept & gather(long_enough, self.user.codes)
        self.history = self.ordered(self.shown)
        self.offsets = np.r_[0, np.cumsum(counts[self.users])]


def _tell_left_out(before: int, after: int, why: str) -> None:
    if after < before:
        _LOG.info("left out: %d of %d events, %s", before - after, before, why)


def _tell_odd_ids(ids: Ids, name: str) -> None:
    """Log texts that are ids like others but are hardly meant to be: words for a missing id, and padded ones."""
    if ids.is_integer:
        return
    word = "[events]: %r in %r is an id like others, of %d events; `where` leaves it out"
    blank = "[events]: ids in %r that begin or end with a blank are others than those without: %d, as %r"
    for start in range(0, len(ids), _ROWS):
        part = ids.values.slice(start, _ROWS)
        bare = pc.ascii_trim_whitespace(part)
        for at in np.flatnonzero(pc.is_in(pc.ascii_lower(bare), value_set=pa.array(sorted(MISSING)))):
            _LOG.info(word, part[at].as_py(), name, np.count_nonzero(ids.codes == start + at))
        if len(padded := part.filter(pc.not_equal(bare, part))):
            _LOG.info(blank, name, len(padded), padded[0].as_py())


def _leave_out_empty(events: dict[str, pa.ChunkedArray], names: EventsConfig) -> None:
    """Events without a user, an item or a time leave `events`. Raises ValueError where they are not to be skipped."""
    count = len(events[names.user])
    empty = {name: events[name].null_count for name in names.keys if events[name].null_count}
    if empty and not names.skip_empty:
        counts = ", ".join(f"{name!r} in {rows:,}" for name, rows in empty.items())
        raise ValueError(f"[events]: empty cells among {count:,} rows: {counts}; skip_empty = true leaves them out")
    if empty:
        full = np.logical_and.reduce([events[name].is_valid().to_numpy() for name in empty])
        for name, column in events.items():
            column = column.filter(pa.array(full))
            events[name] = coded(column) if name in names.ids and can_code(column.type) else column
        _tell_left_out(count, int(full.sum()), f"with an empty {' or '.join(map(repr, empty))}")
    if not len(events[names.user]):
        raise ValueError(f"[events]: {names.file} holds no events")


def first_of_pairs(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    """[n] bool: the first row of each (a, b); a never decreases, b is below `width`. Some rows at a time: sorting all
    at once would take several times their memory."""
    begin, first = 0, np.zeros(len(a), bool)
    while begin < len(a):
        last = a[min(begin + _ROWS, len(a)) - 1]
        part = slice(begin, np.searchsorted(a, last, "right"))
        keys = a[part].astype(np.int64) * width + b[part]
        first[begin + np.unique(keys, return_index=True)[1]] = True
        begin = part.stop
    return first
