"""Dataset: a folder of histories and task tables, memory-mapped."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pcl_ext.data.cache import cached, identity, load
from pcl_ext.data.examples import Examples, group_rows, history_windows
from pcl_ext.data.histories import FILE, build_histories
from pcl_ext.data.item_table import FILE as ITEMS
from pcl_ext.data.item_table import item_ids_sha256
from pcl_ext.data.parquet import require_file
from pcl_ext.data.split import FOLDS
from pcl_ext.data.table import NEXT, TaskTable, load_task
from pcl_ext.data.writer import FORMAT, check_recorded, file_sha256
from pcl_ext.task import check_task_name


class Dataset:
    """A dataset folder (docs/data.md). N users, E events, V items; read-only arrays, one row per user:

    user_id  [N] int64      items  [E] int32, 1..V, oldest first
    fold     [N] uint8      times  [E] int64 or None
    offsets  [N + 1] int64; user u owns items[offsets[u] : offsets[u + 1]]

    The first use streams the Parquet files into .npy files in <path>/.cache (or below the temporary folder where
    that cannot be written); from then on they are memory-mapped. Memory does not depend on the number of users, but
    for 16 bytes a user, once, where users are not sorted by id. Raises FileNotFoundError for a missing file and
    ValueError, naming file, rule, row and value, for one that breaks the format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.info = _read_header(self.path)
        self.name: str = self.info["name"]
        self.num_items: int = self.info["num_items"]
        self.distinct: bool = self.info.get("distinct", False)
        source = self.path / FILE
        require_file(source)
        recorded = self.recorded_sha256(source)
        # as the file is now: what is cached of its tables later is of these histories
        self.key = identity([source], repr((self.num_items, recorded)))
        parts = (source, self.num_items, recorded)
        folder = cached(self.path, "histories", self.key, lambda out: build_histories(*parts, out))
        self.user_id: np.ndarray = load(folder, "user_id")
        self.items: np.ndarray = load(folder, "items")
        self.offsets: np.ndarray = load(folder, "offsets")
        self.fold: np.ndarray = load(folder, "fold")
        self.times: np.ndarray | None = load(folder, "times")
        self._order = load(folder, "order")
        self._histories_sha256 = json.loads((folder / "meta.json").read_text())["sha256"]
        self._tasks: dict[str, tuple[str, TaskTable]] = {}
        self._hashes: dict[Path, tuple[str, str]] = {}

    @property
    def num_users(self) -> int:
        return len(self.user_id)

    @cached_property
    def sha256(self) -> str:
        """Of name, number of items and histories. Task tables have their own, `task_sha256`: tasks may come later."""
        return sha256(repr((self.name, self.num_items, self._histories_sha256)).encode()).hexdigest()

    def task_sha256(self, name: str) -> str:
        """Of the task's two files; of nothing for a task that has none."""
        digest = sha256()
        for path in self._task_files(name):
            digest.update(self._file_sha256(path).encode())
        return digest.hexdigest()

    def _file_sha256(self, path: Path) -> str:
        """Of a file of the dataset, read once as long as it stays as it is."""
        now = identity([path])
        then, digest = self._hashes.get(path, (None, ""))
        if then != now:
            digest = file_sha256(path)
            self._hashes[path] = now, digest
        return digest

    def recorded_sha256(self, path: Path) -> str | None:
        """What dataset.json says of a file of the dataset; None where it says nothing."""
        return self.info.get("sha256", {}).get(path.relative_to(self.path).as_posix())

    def check_recorded(self, path: Path) -> None:
        """ValueError where a file of the dataset is not the one that dataset.json records."""
        if (recorded := self.recorded_sha256(path)) is not None:
            check_recorded(path, recorded, self._file_sha256(path))

    def item_ids_sha256(self, count: int) -> str | None:
        """Of what items.parquet calls the items 1..count (`original_id`), whichever items come after them: datasets
        that agree in it mean the same by an item id up to `count`. None where there is no such file or column."""
        path = self.path / ITEMS
        if path.is_file():
            self.check_recorded(path)
        return item_ids_sha256(path, count)

    def _task_files(self, name: str) -> list[Path]:
        paths = (self.path / "tasks" / f"{name}.json", self.path / "tasks" / f"{name}.parquet")
        return [path for path in paths if path.is_file()]

    @cached_property
    def users_by_fold(self) -> dict[str, int]:
        counts = np.bincount(self.fold, minlength=len(FOLDS)).tolist()
        return dict(zip(FOLDS, counts, strict=True))

    @property
    def task_names(self) -> tuple[str, ...]:
        """`next` first, then the tables that tasks/ holds now, by name."""
        names = sorted(path.stem for path in (self.path / "tasks").glob("*.parquet"))
        for name in names:
            try:
                check_task_name(name)
            except ValueError as error:
                path = self.path / "tasks" / f"{name}.parquet"
                raise ValueError(f"{path} is named as no task can be: {error}; rename it or move it away") from error
        return (NEXT, *(name for name in names if name != NEXT))

    def task(self, name: str) -> TaskTable:
        """The task's table, as its files are now. `next`, where it has none: the last item of every user with two or
        more, given the others.

        Raises ValueError for an unknown task and for a table that breaks the format.
        """
        now = identity(self._task_files(name))
        then, table = self._tasks.get(name, (None, None))
        if table is None or then != now:
            table = load_task(self, name)
            self._tasks[name] = now, table
        return table

    def examples(self, name: str, fold: str | None) -> Examples:
        """The task's examples whose users are in the fold (None: all), one per (user, cut), ordered by it."""
        table = self.task(name)
        rows = np.flatnonzero(self.fold[table.user] == fold_index(fold)) if fold is not None else np.arange(len(table))
        return group_rows(table.user[rows], table.cut[rows], table.target[rows])

    def sequences(self, fold: str | None, max_len: int) -> Examples:
        """Examples without targets that cover whole histories in windows of max_len: cut = n, n - max_len, .. (> 1)."""
        users = np.arange(self.num_users) if fold is None else np.flatnonzero(self.fold == fold_index(fold))
        return history_windows(users, self.offsets[users + 1] - self.offsets[users], max_len)

    def histories(self, fold: str | None) -> Examples:
        """One example without targets per user, of the whole history."""
        users = np.arange(self.num_users) if fold is None else np.flatnonzero(self.fold == fold_index(fold))
        return Examples.without_targets(users, self.offsets[users + 1] - self.offsets[users])

    def rows_of(self, user_ids) -> np.ndarray:
        """Rows of the users with these ids, [m] int64; -1 for unknown ones."""
        ids = np.asarray(user_ids)
        if ids.dtype.kind not in "iuf":
            what = f"user_ids must be integers [m], got {ids.dtype} {list(ids.shape)}"
            raise ValueError(f"{what}; users.parquet says which number each of a log's texts is")
        ids = ids.astype(np.int64)
        found = np.full(len(ids), -1)
        if not self.num_users:
            return found
        order = np.argsort(ids)  # one after the other they are found several times as fast: what they read lies near
        ids = ids[order]
        at = np.searchsorted(self.user_id, ids, sorter=self._order).clip(max=self.num_users - 1)
        rows = at if self._order is None else self._order[at]
        found[order] = np.where(self.user_id[rows] == ids, rows, -1)
        return found

    def describe(self) -> dict[str, Any]:
        """Counts that say what the dataset holds, as JSON values."""
        lengths = np.diff(self.offsets)
        tasks = {name: _describe_task(self.task(name)) for name in self.task_names}
        return {
            "name": self.name,
            "sha256": self.sha256,
            "num_items": self.num_items,
            "events": len(self.items),
            "users": self.users_by_fold,
            "history_length": {"max": int(lengths.max(initial=0))}
            | ({"min": int(lengths.min()), "median": float(np.median(lengths))} if len(lengths) else {}),
            "tasks": tasks,
        }

    def check(self) -> None:
        """Raise where the data leaks or breaks a promise; see pcl_ext.data.check."""
        from pcl_ext.data.check import check  # the checker reads datasets

        check(self)

    def __reduce__(self):
        """A path and a hash: whoever unpickles it, say a worker of a DataLoader, maps the same files."""
        return _reopen, (type(self), self.path, self.sha256)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {self.num_users} users, {self.num_items} items, {str(self.path)!r})"


def _reopen(kind: type[Dataset], path: Path, digest: str) -> Dataset:
    dataset = kind(path)
    if dataset.sha256 != digest:
        raise ValueError(f"{path} is no longer the dataset that was pickled: its sha256 was {digest}")
    return dataset


def fold_index(fold: str) -> int:
    if fold not in FOLDS:
        raise ValueError(f"fold must be one of {', '.join(FOLDS)}, got {fold!r}")
    return FOLDS.index(fold)


def _describe_task(table: TaskTable) -> dict[str, Any]:
    spec = table.spec
    sizes = {"catalogue": 0 if spec.catalogue is None else len(spec.catalogue), "classes": spec.num_classes}
    facts = {"kind": spec.kind, "metric": spec.metric, "rows": len(table)}
    return facts | {name: size for name, size in sizes.items() if size}


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must be a dataset folder, dataset.json is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        got = values.get("format") if isinstance(values, dict) else values
        raise ValueError(f"{path}: format must be {FORMAT}, got {got!r}")
    if not isinstance(values.get("name"), str) or not values["name"]:
        raise ValueError(f"{path}: name must be a string, got {values.get('name')!r}")
    items = values.get("num_items")
    if isinstance(items, bool) or not isinstance(items, int) or not 1 <= items < 2**31:
        raise ValueError(f"{path}: num_items must be an integer from 1 up, got {items!r}")
    if not isinstance(values.get("distinct", False), bool):
        raise ValueError(f"{path}: distinct must be true or false, got {values['distinct']!r}")
    if not isinstance(values.get("sha256", {}), dict):
        raise ValueError(f"{path}: sha256 must map files to their sha256, got {values['sha256']!r}")
    return values
