"""Labels: one value per user (a column of the users table, or a summary of events) becomes 0/1, a class or a number."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.coded import count_codes
from pcl_ext.data.config import TaskConfig
from pcl_ext.data.examples import user_chunks
from pcl_ext.data.log import MISSING, EventLog
from pcl_ext.data.parquet import LARGEST
from pcl_ext.data.targets import task_events
from pcl_ext.data.times import NUMBER

_LOG = logging.getLogger(__name__)
_EVENTS = 1 << 20  # whose values are sorted at a time
_FEW = 10  # train users of a class that is said to be rare


class Labels(NamedTuple):
    """user [m] rows, target [m] (int64 or float32), names of the classes or None."""

    user: np.ndarray
    target: np.ndarray
    names: list[str] | None


def event_values(log: EventLog, task: TaskConfig) -> pa.Array:
    """One value per kept user: `reduce` over the user's events of the task; null where there is none to reduce."""
    label = f"task {task.name!r}"
    kept, _, _ = task_events(log, task)
    if task.reduce in ("any", "count"):
        counts = count_codes(log.user.codes[kept], len(log.user))[log.users]
        return pa.array(counts if task.reduce == "count" else (counts > 0).astype(np.int64))
    column = log.column(task.column, label)
    if task.reduce in ("first", "last"):
        return _at_end(log, kept, column, task.reduce)
    values = numbers(column, f"{label}: column {task.column!r} of reduce {task.reduce!r} (first and last take text)")
    _tell_infinite(values[kept], label)
    kept &= np.isfinite(values)
    chosen = log.ordered(kept)
    user, values = log.row_of[log.user.codes[chosen]], values[chosen]
    return pa.array(_reduce(task.reduce, user, values, len(log.users)), from_pandas=True)


def _at_end(log: EventLog, kept: np.ndarray, column: pa.ChunkedArray, end: str) -> pa.Array:
    """One value per kept user: that of the first or last kept event with one, numbers or text; null without any."""
    kept &= ~pc.is_null(column, nan_is_null=True).to_numpy()
    chosen = log.ordered(kept)[:: 1 if end == "first" else -1]
    users, place = np.unique(log.row_of[log.user.codes[chosen]], return_index=True)
    event, nobody = np.zeros(len(log.users), np.int64), np.ones(len(log.users), bool)
    event[users], nobody[users] = chosen[place], False
    return pa.concat_arrays(column.take(pa.array(event, mask=nobody)).chunks)


def _reduce(how: str, user: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """[count] float64, NaN for users without a value; `user` never decreases. Changes `values`: some users at a time
    are sorted, since sorting all at once would take several times their memory."""
    sizes = np.bincount(user, minlength=count)
    offsets = np.r_[0, np.cumsum(sizes)]
    for begin, end in user_chunks(offsets, _EVENTS):
        part = slice(offsets[begin], offsets[end])
        values[part] = values[part][np.lexsort((values[part], user[part]))]
    starts = offsets[:-1]
    result = np.full(count, np.nan)
    some = sizes > 0
    first, last = starts[some], starts[some] + sizes[some] - 1
    if how in ("sum", "mean"):
        sums = np.bincount(user, weights=values, minlength=count)[some]
        result[some] = sums if how == "sum" else sums / sizes[some]
    elif how == "median":
        result[some] = (values[(first + last) // 2] + values[(first + last + 1) // 2]) / 2
    else:
        result[some] = values[first if how == "min" else last]
    return result


def numbers(column: pa.ChunkedArray | pa.Array, where: str) -> np.ndarray:
    """[n] float64, NaN for null."""
    kind = column.type
    if pa.types.is_decimal(kind) or pa.types.is_boolean(kind):
        column, kind = column.cast(pa.float64() if pa.types.is_decimal(kind) else pa.int8()), pa.float64()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{where} must hold numbers, got {kind}{_such_as(column)}")
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _such_as(column: pa.ChunkedArray | pa.Array) -> str:
    """The first text that is no number, for a message."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return ""
    others = column.filter(pc.invert(pc.match_substring_regex(column, NUMBER)))
    return f", as {others[0].as_py()[:60]!r}" if len(others) else ""


def make_labels(values: pa.Array, task: TaskConfig, train: np.ndarray) -> Labels:
    """values [N], one per user; train [N] bool: whose values set the edges of `bins`."""
    label = f"task {task.name!r}"
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if len(task.ignore):
        unknown = _cast(list(task.ignore), values, f"{label}: ignore")
        values = pc.if_else(pc.is_in(values, value_set=unknown), pa.scalar(None, values.type), values)
    if task.kind == "regression" or task.threshold is not None or task.bins is not None:
        known = numbers(values, f"{label}: its values")
        _tell_infinite(known, label)
        target, names = _from_numbers(known, task, train)
    else:
        target, names = _from_values(values, task, label)
    user = np.flatnonzero(~np.isnan(target))
    if not len(user):
        raise ValueError(f"{label}: no user has a value")
    if values.null_count:
        _LOG.info("%s: users left out, without a value: %d of %d", label, values.null_count, len(values))
    if names is not None:
        _tell_rare(target[user][train[user]].astype(np.int64), names, label)
    if (largest := np.abs(target[user]).max()) > LARGEST:
        raise ValueError(f"{label}: targets must be at most {LARGEST:g} in size, got {largest:g}; take a larger unit")
    return Labels(user, target[user].astype(np.float32 if task.kind == "regression" else np.int64), names)


def _from_numbers(values: np.ndarray, task: TaskConfig, train: np.ndarray) -> tuple[np.ndarray, list[str] | None]:
    values = np.where(np.isfinite(values), values, np.nan)
    if task.kind == "regression":
        return values, None
    if task.threshold is not None:
        edges = [task.threshold]
    elif isinstance(task.bins, int):
        known = values[train & ~np.isnan(values)]
        if not len(known):
            raise ValueError(f"task {task.name!r}: bins needs values of train users, got none")
        edges = np.quantile(known, np.arange(1, task.bins) / task.bins).tolist()
        if len(set(edges)) < len(edges):
            raise ValueError(f"task {task.name!r}: bins = {task.bins} gives equal edges {edges}; give edges yourself")
    else:
        edges = task.bins
    target = np.where(np.isnan(values), np.nan, np.searchsorted(edges, values, side="right"))
    shown = [f"{edge:g}" for edge in edges]
    if len(set(shown)) < len(shown):
        shown = [repr(edge) for edge in edges]
    middle = [f"{low} to {high}" for low, high in zip(shown, shown[1:], strict=False)]
    names = [f"below {shown[0]}", *middle, f"{shown[-1]} or more"]
    if isinstance(task.bins, int):
        counts = np.bincount(target[train & ~np.isnan(target)].astype(np.int64), minlength=task.bins)
        if not counts.all():  # many users have the lowest value
            empty = names[int(counts.argmin())]
            raise ValueError(f"task {task.name!r}: bins = {task.bins} leaves {empty!r} empty; give edges yourself")
    return target, names


def _from_values(values: pa.Array, task: TaskConfig, label: str) -> tuple[np.ndarray, list[str]]:
    null = values.is_null().to_numpy(zero_copy_only=False)
    if task.positive is not None:
        positive = task.positive if isinstance(task.positive, list) else [task.positive]
        wanted = _cast(positive, values, f"{label}: positive")
        _tell_missing(wanted, values, f"{label}: positive")
        hit = pc.is_in(values, value_set=wanted).to_numpy(zero_copy_only=False)
        return np.where(null, np.nan, hit), ["other", ", ".join(map(_shown, positive))]
    if task.labels is not None:
        order = _cast(task.labels, values, f"{label}: labels")
        _tell_missing(order, values, f"{label}: labels")
    else:
        if task.kind == "classes":
            _check_whole(values, label)
        order = pc.unique(values).drop_null()
        order = order.take(pc.array_sort_indices(order))
        _tell_missing_words(values, order, label)
    if task.kind == "binary" and len(order) != 2:
        found = ", ".join(str(value) for value in order.to_pylist()[:5])
        raise ValueError(f"{label}: binary needs 2 values or threshold or positive, got {len(order)}: {found}")
    if len(order) < 2:
        raise ValueError(f"{label}: classes needs at least 2 values, got {len(order)}")
    target = pc.index_in(values, value_set=order).to_numpy(zero_copy_only=False).astype(np.float64)
    if (others := np.isnan(target) & ~null).any():
        found = ", ".join(repr(value) for value in pc.unique(values.filter(pa.array(others))).to_pylist()[:5])
        _LOG.info(
            "%s: users left out, with a value that is not among its labels: %d, with %s", label, others.sum(), found
        )
    return np.where(null | np.isnan(target), np.nan, target), [_shown(value) for value in order.to_pylist()]


def _shown(value) -> str:
    """A class's name. Whole floats are integers that lost their type to a missing value: 18, not 18.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _tell_infinite(values: np.ndarray, label: str) -> None:
    """Log how many values are infinite, as a division by zero leaves them."""
    if count := np.count_nonzero(np.isinf(values)):
        _LOG.info("%s: infinite values, taken for missing ones: %d of %d", label, count, len(values))


def _check_whole(values: pa.Array, label: str) -> None:
    """ValueError for numbers with a fraction: they are measured, not classes. Whole ones may be integers that lost
    their type to a missing value."""
    if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        known = numbers(values.drop_null(), label)
        if (bad := np.flatnonzero(known % 1 != 0)).size:
            got = f"{known[bad[0]]:g} among {len(np.unique(known))} values"
            raise ValueError(f"{label}: classes of numbers that are not whole need bins or labels, got {got}")


def _tell_missing(wanted: pa.Array, values: pa.Array, where: str) -> None:
    """Log which of the wanted values no user has: a misspelt one loses its users."""
    if missing := wanted.filter(pc.invert(pc.is_in(wanted, value_set=pc.unique(values)))).to_pylist():
        known = ", ".join(repr(value) for value in pc.unique(values.drop_null()).to_pylist()[:10])
        _LOG.info("%s: no user has %s; there are %s", where, ", ".join(map(repr, missing)), known)


def _tell_missing_words(values: pa.Array, classes: pa.Array, label: str) -> None:
    """Log the classes whose name is a word for a missing value: a text column keeps it as a text."""
    if pa.types.is_string(classes.type) or pa.types.is_large_string(classes.type):
        for word in classes.to_pylist():
            if word.lower() in MISSING:
                users = pc.sum(pc.equal(values, word)).as_py()
                _LOG.info('%s: "%s" is a class, of %d users; ignore = ["%s"] leaves them out', label, word, users, word)


def _tell_rare(target: np.ndarray, names: list[str], label: str) -> None:
    """Log how many classes few train users have (targets [m] of these): a column of names is soon taken for one of
    classes, and accuracy says nothing of a rare class."""
    counts = np.bincount(target, minlength=len(names))
    if rare := int((counts < _FEW).sum()):
        least = int(counts.argmin())
        what = "%s: classes with fewer than %d train users: %d of %d; %r has %d"
        _LOG.info(what, label, _FEW, rare, len(names), names[least], counts[least])


def _cast(wanted: list, values: pa.Array, where: str) -> pa.Array:
    try:
        return pa.array(wanted).cast(values.type)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{where} must be values of the column ({values.type}), got {wanted!r}") from error
