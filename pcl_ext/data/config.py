"""The TOML file of `pcl prepare events`, as checked values. docs/data.md shows every key at work."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pcl_ext.data.conditions import Condition, parse_conditions
from pcl_ext.task import METRICS, check_task_name

TEXT, NUMBER, WHOLE, YES_NO, LIST = (str,), (int, float), (int,), (bool,), (list, tuple)
ANY = (object,)
REDUCE = ("any", "count", "sum", "mean", "median", "min", "max", "first", "last")


def _key(types: tuple, default: Any = dataclasses.MISSING, name: str | None = None):
    """A dataclass field that is read from the TOML key `name` and must be one of `types`."""
    return field(default=default, metadata={"types": types, "name": name})


@dataclass(frozen=True)
class TableConfig:
    """A Parquet or CSV file, or a folder of Parquet files. Paths are relative to the TOML file.

    columns    names for a CSV without a header line
    delimiter  of a CSV; more than one character is fine, and then no cell is quoted
    quote      the character around cells of a CSV; "" for none
    text       columns to read as text whatever they look like
    """

    file: str = _key(TEXT)
    delimiter: str = _key(TEXT, ",")
    quote: str = _key(TEXT, '"')
    columns: list | None = _key(LIST, None)
    text: list = _key(LIST, ())
    encoding: str = _key(TEXT, "utf-8")

    def __post_init__(self):
        for key in ("columns", "text"):
            if wrong := [name for name in getattr(self, key) or () if not isinstance(name, str)]:
                raise ValueError(f"{self.file}: {key} must be a list of column names, got {wrong[0]!r}")
        long = len(self.delimiter) > 1
        if not self.delimiter or not (long or self.delimiter.isascii()):
            raise ValueError(f"{self.file}: delimiter must be an ASCII character, or several, got {self.delimiter!r}")
        if len(self.quote) > 1 or not self.quote.isascii() or self.quote == self.delimiter:
            raise ValueError(
                f'{self.file}: quote must be an ASCII character other than the delimiter, or "" for none, '
                f"got {self.quote!r}"
            )
        if long and self.quote not in ('"', ""):
            raise ValueError(f"{self.file}: quote is for a delimiter of one character, got {self.delimiter!r}")

    @property
    def as_text(self) -> list[str]:
        """Columns of a CSV that are read as text."""
        return [*self.text, *self.ids]

    @property
    def ids(self) -> list[str]:
        """Columns of ids: integers only where every cell is written as an integer is."""
        return []

    @property
    def keys(self) -> list[str]:
        """Columns of a CSV in which NA, NaN, nan and null mean an empty cell, text as they are."""
        return []


@dataclass(frozen=True)
class EventsConfig(TableConfig):
    """[events]: the log, in any order.

    time         sorts each user's events (stable); left out: the order of the file
    time_unit    s, ms, us or ns: what integers in `time` count since 1970; only needed to compare them with dates
    time_format  strptime format of times, which are read as text; ISO 8601 where left out
    where        conditions an event of a history satisfies
    distinct     keep only the first event of each (user, item)
    skip_empty   leave out rows without a user, item or time; they are refused otherwise
    min_length   users with fewer events in their history are left out
    until        histories end before this date (or raw time)
    item_ids     items.parquet of an earlier dataset: its items keep their ids, whether the log has them or not, and new
                 ones come after them
    """

    user: str = _key(TEXT, "user_id")
    item: str = _key(TEXT, "item_id")
    time: str | None = _key(TEXT, None)
    time_unit: str = _key(TEXT, "s")
    time_format: str | None = _key(TEXT, None)
    where: tuple[Condition, ...] = _key(LIST, ())
    distinct: bool = _key(YES_NO, False)
    skip_empty: bool = _key(YES_NO, False)
    min_length: int = _key(WHOLE, 1)
    until: Any = _key(ANY, None)
    item_ids: str | None = _key(TEXT, None)

    def __post_init__(self):
        super().__post_init__()
        if self.time is None:
            for key, idle in (("time_unit", self.time_unit != "s"), ("time_format", self.time_format is not None)):
                if idle:
                    raise ValueError(f"[events]: {key} is for a log with `time`, the name of its column")
        if self.min_length < 0:
            raise ValueError(f"[events]: min_length must not be negative, got {self.min_length}")

    @property
    def as_text(self) -> list[str]:
        return [*super().as_text, *([self.time] if self.time_format is not None else [])]

    @property
    def ids(self) -> list[str]:
        return [self.user, self.item]

    @property
    def keys(self) -> list[str]:
        return [*self.ids, *([self.time] if self.time else [])]


@dataclass(frozen=True)
class UsersConfig(TableConfig):
    """[users]: one row per user; users without a history are left out."""

    user: str = _key(TEXT, "user_id")

    @property
    def ids(self) -> list[str]:
        return [self.user]


@dataclass(frozen=True)
class ItemsConfig(TableConfig):
    """[items], optional: one row per item. All of its items are known to the dataset, bought or not, and conditions
    may name its columns."""

    item: str = _key(TEXT, "item_id")

    @property
    def ids(self) -> list[str]:
        return [self.item]


@dataclass(frozen=True)
class FoldConfig:
    """[fold]: by = "hash" of the user id, or "date" of the user's first event.

    rotate  0..4, by hash only: train 75 %, valid 5 %, test 20 %, another fifth tested each time
    valid   by date only: users who arrive from then on are valid ..
    test    .. and from then on test
    """

    by: str = _key(TEXT, "hash")
    rotate: int | None = _key(WHOLE, None)
    valid: Any = _key(ANY, None)
    test: Any = _key(ANY, None)


@dataclass(frozen=True)
class SubsetConfig:
    """items = {..} of a task: the items it is about, kept out of all inputs.

    modulo, remainder  items with sha256("<name>:item:<id>")[:8] % modulo == remainder
    where              conditions on the columns of [items]
    """

    modulo: int | None = _key(WHOLE, None)
    remainder: int = _key(WHOLE, 0)
    where: tuple[Condition, ...] = _key(LIST, ())

    def __post_init__(self):
        if self.modulo is not None and self.modulo < 1:
            raise ValueError(f"items: modulo must be 1 or more, got {self.modulo}")
        if not 0 <= self.remainder < (self.modulo or 1):
            raise ValueError(
                f"items: remainder must be in 0..modulo - 1, got {self.remainder} and modulo {self.modulo}"
            )


@dataclass(frozen=True)
class TaskConfig:
    """[[task]]: what it is, where its targets come from, and how values become targets.

    source "users"   `column` of the users table
    source "events"  events with `where`, at or after `from`, before `until` ([events] where and until do not apply):
                     kind items: the items of these events, each once a user (cut "before": and place in the history)
                     other kinds: one value a user, `reduce` over `column`; any (1 or 0) and count need no column
    items            a subset of the items (SubsetConfig); kind items: the catalogue, all of them that occur in the log
    pick             all, first or last: which of a user's events count; kind items
    cut              "end": the whole history is visible; "before": the events before the picked one; kind items
    repeats          targets may be items of the visible history; otherwise such targets are left out

    Labels: `threshold` (value >= threshold is 1), `positive` (a value or a list: these are 1), `bins` (a number: equal
    counts over the train users; a list: edges, value >= edge moves up), `labels` (the values in class order; the rest
    has no label); none of them: all distinct values in order. `ignore` lists values that mean unknown.
    """

    name: str = _key(TEXT)
    kind: str = _key(TEXT)
    description: str = _key(TEXT, "")
    metric: str | None = _key(TEXT, None)
    source: str = _key(TEXT, "users")
    column: str | None = _key(TEXT, None)
    where: tuple[Condition, ...] = _key(LIST, ())
    start: Any = _key(ANY, None, "from")
    until: Any = _key(ANY, None)
    items: SubsetConfig | None = _key((dict,), None)
    pick: str = _key(TEXT, "all")
    cut: str = _key(TEXT, "end")
    repeats: bool = _key(YES_NO, False)
    reduce: str = _key(TEXT, "any")
    threshold: float | None = _key(NUMBER, None)
    positive: Any = _key(ANY, None)
    bins: Any = _key((int, list), None)
    labels: list | None = _key(LIST, None)
    ignore: list = _key(LIST, ())

    def __post_init__(self):
        where = f"task {self.name!r}: "
        check_task_name(self.name)
        if self.name == "next":
            raise ValueError(where + "next is always there, it needs no [[task]]")
        for key, options in (
            ("kind", tuple(METRICS)),
            ("source", ("users", "events")),
            ("pick", ("all", "first", "last")),
            ("cut", ("end", "before")),
            ("reduce", REDUCE),
        ):
            if getattr(self, key) not in options:
                raise ValueError(where + f"{key} must be one of {', '.join(options)}, got {getattr(self, key)!r}")
        if self.metric not in (None, *METRICS[self.kind]):
            raise ValueError(where + f"metric must be one of {', '.join(METRICS[self.kind])}, got {self.metric!r}")
        if self.kind == "items" and self.source != "events":
            raise ValueError(where + 'kind items needs source = "events"')
        self._check_idle(where)
        if self.kind != "items" and self._reads_column() and self.column is None:
            raise ValueError(where + "column is missing")
        self._check_labels(where)

    def _reads_column(self) -> bool:
        return self.source == "users" or self.reduce not in ("any", "count")

    def _check_idle(self, where: str) -> None:
        """ValueError for a key that would do nothing: who gave it believes that it does."""
        names = {f.name: f.metadata["name"] or f.name for f in fields(self)}
        given = [f.name for f in fields(self) if f.default is not dataclasses.MISSING]
        given = [key for key in given if getattr(self, key) != getattr(type(self), key)]
        for keys, needed, there in (
            (("pick", "cut", "repeats"), "kind items", self.kind == "items"),
            (("column", "reduce"), "other kinds than items", self.kind != "items"),
            (("where", "start", "until", "items", "reduce"), 'source = "events"', self.source == "events"),
            (("column",), f"a reduce that reads it ({', '.join(REDUCE[2:])})", self._reads_column()),
        ):
            if not there and (idle := [names[key] for key in given if key in keys]):
                raise ValueError(where + f"{idle[0]} is for {needed}")

    def _check_labels(self, where: str) -> None:
        if self.labels is not None and (twice := [x for i, x in enumerate(self.labels) if x in self.labels[:i]]):
            raise ValueError(where + f"labels must differ, {twice[0]!r} is there twice")
        given = [key for key in ("threshold", "positive", "bins", "labels") if getattr(self, key) is not None]
        allowed = {"binary": ("threshold", "positive", "labels"), "classes": ("bins", "labels")}.get(self.kind, ())
        if wrong := [key for key in given if key not in allowed]:
            raise ValueError(where + f"{wrong[0]} is not for kind {self.kind}")
        if len(given) > 1:
            raise ValueError(where + f"only one of {' and '.join(given)} may be given")
        if self.bins is not None and not _is_bins(self.bins):
            raise ValueError(where + f"bins must be a number from 2 up or a list of rising edges, got {self.bins!r}")


def _is_bins(bins: int | list) -> bool:
    if isinstance(bins, int):
        return bins >= 2
    numbers = all(isinstance(edge, NUMBER) and not isinstance(edge, bool) for edge in bins)
    return bool(bins) and numbers and sorted(set(bins)) == list(bins)


@dataclass(frozen=True)
class LogConfig:
    """The whole file. `name` is hashed with the ids: another name, another split."""

    name: str
    folder: Path
    events: EventsConfig
    users: UsersConfig | None = None
    items: ItemsConfig | None = None
    fold: FoldConfig = FoldConfig()
    tasks: tuple[TaskConfig, ...] = ()

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"[[task]] names must differ, got {', '.join(names)}")
        for task in self.tasks:
            if task.source == "users" and self.users is None:
                raise ValueError(f"task {task.name!r}: source users needs a [users] table")
            if task.items is not None and task.items.where and self.items is None:
                raise ValueError(f"task {task.name!r}: items.where needs an [items] table")

    @property
    def read_later(self) -> set[str]:
        """Columns of the log that conditions and labels read, where the log has them."""
        conditions = {condition.column for part in (self.events, *self.tasks) for condition in part.where}
        return conditions | {task.column for task in self.tasks if task.source == "events" and task.column}


def read_config(path: str | Path) -> LogConfig:
    """Raises FileNotFoundError, or ValueError naming the file and the key."""
    path = Path(path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"config must be a TOML file, {path} is missing")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return parse_config(tomllib.loads(path.read_text(encoding="utf-8-sig")), path.parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(values: dict[str, Any], folder: Path) -> LogConfig:
    """A TOML document as a dict -> LogConfig; `folder` is where its files are."""
    known = {"name": str, "events": dict, "users": dict, "items": dict, "fold": dict, "task": list}
    _check_known(values, known, "the file")
    _check_numbers(values, "")
    for key, kind in known.items():
        if key in values and not isinstance(values[key], kind):
            raise ValueError(f"{key} must be a {kind.__name__}, got {values[key]!r}")
    for key in ("name", "events"):
        if not values.get(key):
            raise ValueError(f"{key} is missing")
    parts = {"events": EventsConfig, "users": UsersConfig, "items": ItemsConfig, "fold": FoldConfig}
    given = {key: parse(cls, values[key], f"[{key}]") for key, cls in parts.items() if key in values}
    tasks = tuple(parse(TaskConfig, task, f"[[task]] {i + 1}") for i, task in enumerate(values.get("task", [])))
    return LogConfig(values["name"], Path(folder), tasks=tasks, **given)


def parse(cls, values: dict[str, Any], where: str):
    """A dict -> the dataclass `cls`; raises ValueError for unknown, missing and wrongly typed keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table, got {values!r}")
    by_name = {f.metadata["name"] or f.name: f for f in fields(cls)}
    _check_known(values, by_name, where)
    found = {}
    for name, spec in by_name.items():
        if name not in values:
            if spec.default is dataclasses.MISSING:
                raise ValueError(f"{where}: {name} is missing")
            continue
        value, types = values[name], spec.metadata["types"]
        if types != ANY and (not isinstance(value, types) or (isinstance(value, bool) and types != YES_NO)):
            expected = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{where}: {name} must be {expected}, got {value!r}")
        if name == "where":
            value = parse_conditions(value, f"{where}: where")
        elif spec.metadata["types"] == (dict,):
            value = parse(SubsetConfig, value, f"{where}: {name}")
        found[spec.name] = value
    return cls(**found)


def _check_known(values: dict, known, where: str) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _check_numbers(value: Any, where: str) -> None:
    """ValueError for a number that no column holds: it would end in an overflow, or be compared with nothing."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(part, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_numbers(part, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} must be an integer of at most 63 bits, got {value}")
