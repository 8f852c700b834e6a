"""Times of a log as int64: raw integers as they are, everything else in microseconds since 1970 (UTC)."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pcl_ext.data._arrow import pa, pc

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)
NUMBER = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_date(value: Any) -> bool:
    return isinstance(value, dt.date)  # a datetime is one, too


def _as_python_3_10_reads(text: str) -> str:
    """An ISO datetime with its zone in figures and six figures of a second: its reader takes no others."""
    text = re.sub(r"Z$", "+00:00", text)
    return re.sub(r"(:\d\d)[.,](\d{1,6})\d*", lambda found: f"{found[1]}.{found[2]:<06}", text)


def parse_time(value: Any, where: str) -> int | dt.datetime:
    """A TOML date, datetime, ISO string or raw integer -> int or an aware datetime (UTC where no zone is given)."""
    if isinstance(value, bool) or not isinstance(value, int | str | dt.date):
        raise ValueError(f"{where} must be a date or an integer, got {value!r}")
    if isinstance(value, int):
        return value
    try:
        date = dt.datetime.fromisoformat(_as_python_3_10_reads(value)) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{where} must be a date as in 2011-09-10, got {value!r}") from None
    if not isinstance(date, dt.datetime):
        date = dt.datetime(date.year, date.month, date.day)
    return date if date.tzinfo else date.replace(tzinfo=dt.timezone.utc)


class TimeColumn:
    """The times of all events, [n] int64, and their unit, so that dates and raw times can be compared with them.

    unit  what `values` count; raw  what integers of the TOML file count
    """

    def __init__(self, column: pa.ChunkedArray, unit: str, time_format: str | None, where: str):
        if unit not in _PER_SECOND:
            raise ValueError(f"{where}_unit must be one of {', '.join(_PER_SECOND)}, got {unit!r}")
        numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        if numbers and time_format is not None:
            raise ValueError(f"{where}_format is for times that are text, got {column.type}; leave it out")
        if time_format is not None:
            _check_format(time_format, f"{where}_format")
        self.raw = unit if numbers else "us"
        if pa.types.is_integer(column.type):
            self.unit, self.values = unit, column.cast(pa.int64()).to_numpy()
        elif pa.types.is_floating(column.type):
            self.unit, self.values = "us", _whole_microseconds(column.to_numpy(), unit, where)
        else:
            self.unit, self.values = "us", _microseconds(column, time_format, where)

    def bound(self, value: Any, where: str) -> int | None:
        """The first of `values` that would not be before `value`; None for None."""
        if value is None:
            return None
        date = parse_time(value, where)
        if isinstance(date, int):
            return _rescale(date, self.raw, self.unit)
        bound = _rescale((date - _EPOCH) // dt.timedelta(microseconds=1), "us", self.unit)
        self._check_dates(bound, where)
        return bound

    def _check_dates(self, bound: int, where: str) -> None:
        """ValueError where a date is compared with times that are none."""
        edges = np.array([self.values.min(initial=0), self.values.max(initial=0)])
        largest, second = int(np.abs(edges).max()), _PER_SECOND[self.unit]
        late, early = largest > 10**11 * second, largest < 10**8 * second < bound  # 5138, and 1973
        if late or early:
            text = f"is a date, but times reach {largest}, {'no date' if late else 'before 1973'} in {self.unit!r}"
            hint = "give [events] time_unit; or time_format, where they are dates as in 20240115"
            raise ValueError(f"{where} {text}: {hint}")


def _check_format(time_format: str, where: str) -> None:
    """ValueError for what strptime passes over without a word: the times would be hours off."""
    keys = time_format.replace("%%", "")
    if "%Z" in keys:
        hint = "%z reads +0100, and a name that all times have stands as it is, as UTC"
        raise ValueError(f"{where}: %Z passes over the name of a zone; {hint}; got {time_format!r}")
    if "%p" in keys and "%H" in keys:
        raise ValueError(f"{where}: %H passes over AM and PM, %I reads them with %p; got {time_format!r}")


def _rescale(time: int, unit: str, to: str) -> int:
    """The first whole time of the unit `to` that is not before `time`."""
    return -(-time * _PER_SECOND[to] // _PER_SECOND[unit])


def _whole_microseconds(times: np.ndarray, unit: str, where: str) -> np.ndarray:
    """Of times with a fraction."""
    scaled = np.round(times.astype(np.float64) * (10**6 / _PER_SECOND[unit]))
    if not np.isfinite(scaled).all():
        raise ValueError(f"{where} must be finite, got infinite times")
    if np.abs(scaled).max(initial=0) >= 2.0**63:
        raise ValueError(f"{where}: times reach {np.abs(times).max():g}, too many {unit!r}; give [events] time_unit")
    return scaled.astype(np.int64)


def _microseconds(column: pa.ChunkedArray, time_format: str | None, where: str) -> np.ndarray:
    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column = column.cast(kind.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = _from_text(column, time_format, where)
        if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
            raise ValueError(f"{where} must be integers, timestamps, dates or text, got {kind}")
        zone = getattr(column.type, "tz", None)
        return column.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(f"{where} ({kind}) is not a time: {error}") from error


def _from_text(column: pa.ChunkedArray, time_format: str | None, where: str) -> pa.ChunkedArray:
    """By the format; without one ISO, with or without a zone as the first time has it."""
    if time_format is not None:
        parse = lambda part: pc.strptime(part, format=time_format, unit="us")  # noqa: E731
        wanted = f"must be written as {time_format!r}"
    else:
        zone = None if _parses(lambda part: part.cast(pa.timestamp("us")), column[:1]) else "UTC"
        parse = lambda part: part.cast(pa.timestamp("us", zone))  # noqa: E731
        wanted = "must be times as 2011-09-10 12:30:00, with a zone all or none; time_format tells another form"
    try:
        return parse(column)
    except pa.ArrowInvalid:
        row = first_bad(column, lambda part: _parses(parse, part))
        if time_format is None:
            numbers = pc.match_substring_regex(column, NUMBER).to_numpy()
            if len(numbers) / 2 < np.count_nonzero(numbers) < len(numbers):
                row, wanted = int(np.argmin(numbers)), "must be numbers where most are"
        got = f"{column[row].as_py()[:60]!r} in row {row + 1:,} of {len(column):,}"
        raise ValueError(f"{where} {wanted}, got {got}") from None


def first_bad(column: pa.ChunkedArray, good: Callable[[pa.ChunkedArray], bool]) -> int:
    """The row of the first value that is not good, where a part of the column is good as all of its values are."""
    first, end = 0, len(column)
    while end - first > 1:
        middle = (first + end) // 2
        first, end = (middle, end) if good(column[first:middle]) else (first, middle)
    return first


def _parses(parse, column: pa.ChunkedArray) -> bool:
    try:
        parse(column)
    except pa.ArrowInvalid:
        return False
    return True


def to_date_column(column: pa.ChunkedArray, value: Any) -> tuple[pa.ChunkedArray, Any]:
    """A temporal column and a date value (or a list of them) as microseconds, comparable."""
    values = value if isinstance(value, list) else [value]
    dates = [parse_time(v, "the value") for v in values]
    micro = [(d - _EPOCH) // dt.timedelta(microseconds=1) for d in dates]
    column = column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=False).cast(pa.int64())
    return column, micro if isinstance(value, list) else micro[0]
