"""Columns of ids as Arrow dictionaries: each id once, and a code of 4 bytes a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pcl_ext.data._arrow import pa

_IDS = 1 << 18  # of pieces that may wait to be joined
_ROWS = 1 << 20  # that are looked at a time


class Coder:
    """One column of ids that comes in pieces. The dictionary holds ids that occur, in the order of their first rows.

    Each piece is encoded by itself. Pieces wait until they hold more ids than are known: so joining them takes little
    time in all, and what waits is never much larger than what is kept.
    """

    def __init__(self, kind: pa.DataType):
        self._ids = pa.array([], kind.value_type if pa.types.is_dictionary(kind) else kind)
        self._codes = [pa.array([], pa.int32())]
        self._waiting: list[tuple[pa.Array, pa.Array]] = []

    def append(self, piece: pa.Array) -> None:
        if pa.types.is_dictionary(piece.type):  # which may hold ids of no row
            used = piece.indices.dictionary_encode()
            self._waiting.append((piece.dictionary.take(used.dictionary), used.indices))
        else:
            encoded = piece.dictionary_encode()
            self._waiting.append((encoded.dictionary, encoded.indices))
        if sum(len(ids) for ids, _ in self._waiting) > max(_IDS, len(self._ids)):
            self._join()

    def column(self) -> pa.ChunkedArray:
        """All pieces as one dictionary array of int32 codes."""
        self._join()
        codes, self._codes = pa.concat_arrays(self._codes), []
        return pa.chunked_array([pa.DictionaryArray.from_arrays(codes, self._ids)])

    def _join(self) -> None:
        joined = pa.concat_arrays([self._ids, *(ids for ids, _ in self._waiting)]).dictionary_encode()
        start = len(self._ids)
        for ids, codes in self._waiting:
            self._codes.append(joined.indices.slice(start, len(ids)).take(codes))
            start += len(ids)
        self._ids, self._waiting = joined.dictionary, []


def can_code(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold ids: integers, floats or text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return number or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def coded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    coder = Coder(column.type)
    for chunk in column.chunks:
        coder.append(chunk)
    return coder.column()


def with_ids(column: pa.ChunkedArray, change: Callable[[pa.Array], pa.Array]) -> pa.ChunkedArray:
    """A dictionary column with other ids: `change` takes a dictionary and gives an id, or null, for each of it."""
    chunks = []
    for chunk in column.chunks:
        ids = change(chunk.dictionary).dictionary_encode()
        chunks.append(pa.DictionaryArray.from_arrays(ids.indices.take(chunk.indices), ids.dictionary))
    return pa.chunked_array(chunks, chunks[0].type if chunks else column.type)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column, without a dictionary."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def give_back() -> None:
    """Memory that Arrow has let go returns to the system: its pool would keep some for what comes."""
    pa.default_memory_pool().release_unused()


def pieces(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))


def gather(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """values[rows], some rows at a time: NumPy would hold all of `rows` as int64."""
    found = np.empty(len(rows), values.dtype)
    for piece in pieces(len(rows), _ROWS):
        found[piece] = values[rows[piece]]
    return found


def count_codes(codes: np.ndarray, size: int) -> np.ndarray:
    """[size] int64, how often each code is there, some rows at a time, as in `gather`."""
    found = np.zeros(size, np.int64)
    for piece in pieces(len(codes), max(_ROWS, size)):
        found += np.bincount(codes[piece], minlength=size)
    return found
