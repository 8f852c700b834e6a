"""Conditions on columns: (column, op, value), all of which a row satisfies. A null satisfies none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.coded import plain
from pcl_ext.data.times import is_date, to_date_column

_OPS: dict[str, Callable] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_SETS = ("in", "not in")


class Condition(NamedTuple):
    """column op value; op one of == != < <= > >= in, not in."""

    column: str
    op: str
    value: Any


def parse_conditions(values: list, where: str) -> tuple[Condition, ...]:
    """[["rating", ">=", 4], ..] -> conditions; raises ValueError naming the wrong one."""
    found = []
    for i, value in enumerate(values):
        if not (isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[0], str)):
            raise ValueError(f"{where} must be a list of [column, op, value], got {value!r} at {i}")
        condition = Condition(*value)
        if condition.op not in (*_OPS, *_SETS):
            raise ValueError(f"{where}: op must be one of {', '.join((*_OPS, *_SETS))}, got {condition.op!r}")
        if (condition.op in _SETS) != isinstance(condition.value, list):
            raise ValueError(f"{where}: in and not in take a list, the others a value, got {value!r}")
        found.append(condition)
    return tuple(found)


def holds(condition: Condition, column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Boolean column; raises ValueError where the column's type cannot be compared with the value."""
    _, op, value = condition
    column = plain(column)
    try:
        if is_date(value) and not (pa.types.is_temporal(column.type)):
            raise pa.ArrowTypeError("a date is compared with a date column only")
        if pa.types.is_temporal(column.type):
            column, value = to_date_column(column, value)
        if op in _SETS:
            result = pc.is_in(column, value_set=pa.array(value).cast(column.type))
            result = result if op == "in" else pc.invert(result)
            return pc.and_(result, column.is_valid())
        return _OPS[op](column, pa.scalar(value)).combine_chunks().fill_null(False)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        text = f"{where}: {condition.column} ({column.type}) cannot be compared by {op} with {value!r}"
        raise ValueError(f"{text}: {error}") from error
