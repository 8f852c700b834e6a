"""Cells of text: which are empty, which ids are integers, and which ids no file means."""

from __future__ import annotations

import logging
import re

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.coded import with_ids
from pcl_ext.data.times import first_bad

_LOG = logging.getLogger(__name__)
_NUMBER = re.compile(r"\s*[-+]?\d[\d.]*\s*")
_SHOWN = 60  # characters of a cell in a message


def empty_as_null(table: pa.Table, name: str, empty: list[str]) -> pa.Table:
    """A column of text with null for what is written as one of `empty`; any other column as it is."""
    column = table[name]
    coded = pa.types.is_dictionary(column.type)
    kind = column.type.value_type if coded else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return table
    without = lambda text: _without(text, empty)  # noqa: E731
    return _replace(table, name, with_ids(column, without) if coded else without(column))


def integer_ids(table: pa.Table, name: str, empty: list[str], where: str) -> pa.Table:
    """A coded column of text as int64 where every id is an integer as `str` writes it, or one of `empty`: null.

    So is a column of integers with ".0" each, as pandas writes one with gaps. Any other stays text, as 007 is not 7;
    where it begins with a number, this is logged.
    """
    column = table[name]
    ids = column.chunk(0).dictionary
    filled = lambda text: _without(text, empty)  # noqa: E731
    for clean in (lambda text: text, filled, lambda text: _without_point(filled(text))):
        if (numbers := _integers(clean(ids))) is not None:
            return _replace(table, name, with_ids(column, lambda _: numbers))
    if _NUMBER.fullmatch(ids[0].as_py()):
        bad = ids[first_bad(ids, lambda part: _integers(filled(part)) is not None)].as_py()
        what = "%s: the ids in %r stay text, %r is not written as an integer of at most 63 bits is"
        _LOG.info(what, where, name, bad[:_SHOWN])
    return table


def refuse_line_breaks(column: pa.ChunkedArray, where: str) -> None:
    """ValueError for an id with a line break: most likely lines that a quote has swallowed."""
    coded = pa.types.is_dictionary(column.type)
    texts = column.chunk(0).dictionary if coded else column
    if pa.types.is_string(texts.type) and pc.any(found := pc.match_substring(texts, "\n")).as_py():
        place = found.index(True)
        row = (column.chunk(0).indices.index(place.cast(pa.int32())) if coded else place).as_py()
        raise ValueError(
            f"{where} must not hold line breaks, got {column[row].as_py()[:_SHOWN]!r} in row {row + 1:,}: most likely "
            'a quote that opens a cell and is not closed there; quote = "" reads quotes as any other character'
        )


def _integers(text: pa.Array) -> pa.Array | None:
    """int64; None where one is not an integer as `str` writes it."""
    try:
        numbers = text.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return None if pc.any(pc.not_equal(numbers.cast(pa.string()), text)).as_py() else numbers


def _without(text: pa.Array | pa.ChunkedArray, empty: list[str]):
    return pc.if_else(pc.is_in(text, pa.array(empty, text.type)), pa.scalar(None, text.type), text)


def _without_point(text: pa.Array) -> pa.Array:
    """Without ".0" at the end; no number where there is none."""
    return pc.if_else(pc.ends_with(text, ".0"), pc.utf8_slice_codeunits(text, 0, -2), "")


def _replace(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)
