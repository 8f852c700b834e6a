"""What a Predictor takes: Arrow, dicts of arrays, lists. All become packed ids and offsets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcl_ext.batch import PackedBatch

BATCH_TOKENS = 16_384
_BOOLS = {bool, np.bool_}
_FEW = 8  # ids of a list that are shown where one is wrong; of a longer one, it alone


@dataclass(frozen=True)
class Histories:
    """B histories back to back, oldest event first, unknown ids included; arrays may be memory-mapped.

    items    [E] int32 or int64
    offsets  [B + 1] int64; history b is items[offsets[b] : offsets[b + 1]]
    """

    items: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def chunks(self, max_tokens: int, max_len: int) -> Iterator[slice]:
        """Runs of consecutive histories, at most max_tokens of their newest max_len events each (or one history); one
        of no histories where there are none."""
        if not len(self):
            yield slice(0, 0)
        ends = np.maximum(np.minimum(np.diff(self.offsets), max_len), 1).cumsum()
        first = 0
        while first < len(self):
            done = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + max_tokens, side="right")))
            yield slice(first, last)
            first = last

    def known(self, rows: slice, num_items: int) -> tuple[Histories, np.ndarray]:
        """The rows' ids that lie in 1..num_items, and how many of each history do not [b] int64."""
        offsets = np.asarray(self.offsets[rows.start : rows.stop + 1])
        items = np.asarray(self.items[offsets[0] : offsets[-1]])
        known = (items >= 1) & (items <= num_items)
        before = np.concatenate([[0], np.cumsum(known)])
        kept = before[offsets - offsets[0]]
        return Histories(items[known].astype(np.int64, copy=False), kept), np.diff(offsets) - np.diff(kept)

    def batch(self, max_len: int) -> PackedBatch:
        """All of them, the newest max_len events of each; those before them as its `older`."""
        return PackedBatch.from_stored(self.items, self.offsets, np.arange(len(self)), np.diff(self.offsets), max_len)


def read_histories(data: Any, column: str = "items") -> Histories:
    """Histories of a batch in any form that is taken, checked.

    An Arrow table or record batch with a list column `column`, or such a column itself; a dict (or a data frame) with
    `column`, a list (or an array) of arrays, or with `values` [E] and `offsets` [B + 1]; a list of lists. Ids are
    integers, oldest first. ValueError or TypeError names what is wrong and where.
    """
    data = frame_to_dict(data)
    if isinstance(data, Histories):
        return data
    if type(data).__module__.partition(".")[0] == "pyarrow":
        return _from_arrow(data, column)
    if isinstance(data, Mapping):
        if column in data:
            return _from_lists(data[column], column)
        if "values" in data and "offsets" in data:
            return _from_packed(data["values"], data["offsets"])
        raise ValueError(
            f"a dict of arrays must hold {column!r}, or 'values' and 'offsets', got {', '.join(map(str, data)) or '{}'}"
        )
    if isinstance(data, (str, bytes)) or not hasattr(data, "__len__"):
        raise TypeError(
            f"histories must be an Arrow table, a dict of arrays or a list of lists, got {type(data).__name__}"
        )
    return _from_lists(data)


def frame_to_dict(data: Any) -> Any:
    """A data frame, as of pandas or polars, as its columns by name; anything else as it is."""
    is_frame = hasattr(data, "columns") and hasattr(data, "to_dict")
    return {name: data[name] for name in data.columns} if is_frame else data


def _from_arrow(data: Any, column: str) -> Histories:
    import pyarrow as pa

    if isinstance(data, (pa.Table, pa.RecordBatch)):
        if column not in data.schema.names:
            raise ValueError(f"the Arrow table must have a column {column!r}, it has {', '.join(data.schema.names)}")
        data = data.column(column)
    if isinstance(data, pa.ChunkedArray):
        data = data.combine_chunks() if data.num_chunks != 1 else data.chunk(0)
    if isinstance(data, pa.ChunkedArray):  # without chunks, or larger than one array can be
        data = pa.concat_arrays(data.chunks) if data.num_chunks else pa.array([], data.type)
    kind = data.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists and pa.types.is_null(kind.value_type):  # new users alone: nothing says what their items would be
        kind, data = pa.list_(pa.int64()), data.cast(pa.list_(pa.int64()))
    if not lists or not pa.types.is_integer(kind.value_type):
        raise TypeError(f"{column} must be a list column of integers, got {kind}")
    if data.null_count:
        row = int(np.flatnonzero(data.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{column} must be without nulls, got one in row {row}; an empty history is an empty list")
    values = data.flatten()
    offsets = _offsets(data.value_lengths().to_numpy(zero_copy_only=False))
    if values.null_count:
        first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(offsets, first, side="right")) - 1
        raise ValueError(f"{column} must hold item ids, got {values.null_count} nulls, the first in row {row}")
    return Histories(_ids(values.to_numpy(zero_copy_only=False), column), offsets)


def _from_packed(values: Any, offsets: Any) -> Histories:
    values, offsets = _ids(_array(values), "values"), _ids(_array(offsets), "offsets").astype(np.int64)
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must run from 0 to len(values) = {len(values)} and never decrease")
    return Histories(values, offsets)


def _from_lists(data: Iterable, column: str | None = None) -> Histories:
    if isinstance(data, np.ndarray) and data.ndim == 2:
        if data.dtype.kind not in "iu" and data.size:
            raise TypeError(f"histories must be integers, got {data.dtype} of shape {list(data.shape)}")
        items = _ids(data.reshape(-1), "histories")
        return Histories(items, np.arange(len(data) + 1) * data.shape[1])
    try:
        data = iter(data)
    except TypeError as error:
        raise TypeError(f"{column or 'histories'} must be a list of lists of item ids, got {_shown(data)}") from error
    rows = [_ids_of(history, row, column) for row, history in enumerate(data)]
    items = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return Histories(items, _offsets(np.fromiter(map(len, rows), np.int64, len(rows))))


def _ids_of(history: Any, row: int, column: str | None) -> np.ndarray:
    ids, is_list = _array(history), isinstance(history, (list, tuple))
    if ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size):
        if not is_list or _BOOLS.isdisjoint(map(type, history)):  # among numbers, numpy takes True for a 1
            return ids.astype(np.int64, copy=False)
    where, got = f"history {row}" if column is None else f"{column}[{row}]", _shown(history)
    odd = next((place for place, item in enumerate(history) if not _is_whole(item)), None) if is_list else None
    if odd is not None and len(history) > _FEW:
        got = f"{_shown(history[odd])} at place {odd}"
    elif is_list and odd is None:
        got += "; an id is less than 2**63"
    elif isinstance(history, np.ndarray):
        got += f" of {ids.dtype}"
    hint = "; ItemIds.known turns those of a log into them" if ids.dtype.kind == "U" else ""
    if column is None and _is_whole(history):
        hint = "; one history is a list in a list: [[1, 2, 3]]"
    raise ValueError(f"{where} must be a flat list of integer item ids, got {got}{hint}")


def _array(values: Any) -> np.ndarray:
    """As an array; of what cannot be one, an array of no dimension."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # the last one: a tensor that wants a gradient
        return np.array(None)


def _is_whole(item: Any) -> bool:
    return isinstance(item, (int, np.integer)) and not isinstance(item, bool)


def _shown(value: Any) -> str:
    try:
        return f"{value!s:.80}"
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        return f"a {type(value).__name__} too large to show"


def _ids(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim != 1 or (values.dtype.kind not in "iu" and values.size):
        raise TypeError(f"{name} must be a flat array of integers, got {values.dtype} of shape {list(values.shape)}")
    if values.dtype not in (np.int32, np.int64):
        values = values.astype(np.int64)  # of uint64, what does not fit turns negative: unknown, as it should be
    return np.ascontiguousarray(values)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
