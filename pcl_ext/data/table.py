"""A task's table: tasks/<name>.json and .parquet, or the derived next-item task."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pcl_ext.data.cache import NpyFolder, cached, identity, load
from pcl_ext.data.examples import ordered
from pcl_ext.data.parquet import Column, open_parquet, pieces
from pcl_ext.progress import progress
from pcl_ext.task import TaskSpec

if TYPE_CHECKING:
    from pcl_ext.data.dataset import Dataset

NEXT = "next"
_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TaskTable:
    """One row per target, memory-mapped.

    spec    what the task is
    user    [M] int64, the user's row in the dataset (not the id)
    cut     [M] int32, how many events of the history the model may see
    target  [M] int64 (item id, class, 0/1) or float32 (regression)
    time    [M] int64 or None
    """

    spec: TaskSpec
    user: np.ndarray
    cut: np.ndarray
    target: np.ndarray
    time: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user)


def load_task(dataset: Dataset, name: str) -> TaskTable:
    """Raises ValueError for an unknown task, and for a file that breaks its promises."""
    if name not in dataset.task_names:
        raise ValueError(f"task must be one of {', '.join(dataset.task_names)}, got {name!r}")
    path = dataset.path / "tasks" / f"{name}.parquet"
    if name == NEXT and not path.exists():
        spec = _next_spec(dataset)
        key = identity([], dataset.key)
        folder = cached(dataset.path, "next", key, lambda out: _build_next(dataset, out))
    else:
        spec = _read_spec(dataset, path.with_suffix(".json"), name)
        key = identity([path], repr((spec, dataset.key, dataset.recorded_sha256(path))))
        folder = cached(dataset.path, f"task-{name}", key, lambda out: _build_table(dataset, path, spec, out))
    arrays = {column: load(folder, column) for column in ("user", "cut", "target", "time")}
    return TaskTable(spec, **arrays)


def _next_spec(dataset: Dataset) -> TaskSpec:
    path = dataset.path / "tasks" / f"{NEXT}.json"
    if path.exists():
        return _read_spec(dataset, path, NEXT)
    return TaskSpec(NEXT, "items", "the next item of a user's history", repeats=not dataset.distinct)


def _read_spec(dataset: Dataset, path: Path, name: str) -> TaskSpec:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    dataset.check_recorded(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"must hold an object, got {type(values).__name__}")
        for key in ("name", "kind"):
            if key not in values:
                raise ValueError(f"{key} is missing")
        spec = TaskSpec.from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if spec.name != name:
        raise ValueError(f"{path}: name must be the file's, {name!r}, got {spec.name!r}")
    if name == NEXT and (spec.kind != "items" or spec.catalogue is not None):
        got = spec.kind if spec.kind != "items" else "a catalogue"
        raise ValueError(f"{path}: next ranks all items: kind must be items and catalogue left out, got {got}")
    if spec.catalogue is not None and max(spec.catalogue) > dataset.num_items:
        raise ValueError(f"{path}: catalogue must hold ids 1..{dataset.num_items}, got {max(spec.catalogue)}")
    return spec


def _build_next(dataset: Dataset, out: Path) -> None:
    with NpyFolder(out, user=np.int64, cut=np.int32, target=np.int64) as arrays:
        for start in range(0, dataset.num_users, _CHUNK):
            offsets = dataset.offsets[start : start + _CHUNK + 1]
            lengths = np.diff(offsets)
            kept = np.flatnonzero(lengths >= 2)
            target = dataset.items[offsets[kept + 1] - 1]
            arrays.append(user=start + kept, cut=lengths[kept] - 1, target=target)


def _build_table(dataset: Dataset, path: Path, spec: TaskSpec, out: Path) -> None:
    file = open_parquet(path, ("user_id", "target", "cut"), ("time",))
    dataset.check_recorded(path)
    timed, ranked = "time" in file.schema_arrow.names, _ranked(dataset, spec)
    dtypes = {"user": np.int64, "cut": np.int32, "target": np.float32 if spec.kind == "regression" else np.int64}
    if timed:
        dtypes["time"] = np.int64
    bar = progress(f"reading {path.name}", file.metadata.num_rows, " rows")
    with NpyFolder(out, **dtypes) as arrays, bar:
        for base, batch in pieces(file, path, ["user_id", "target", "cut"] + ["time"] * timed):
            ids = Column(path, "user_id").integers(batch["user_id"], base)
            user = dataset.rows_of(ids)
            Column(path, "user_id").require(user >= 0, "a user of histories.parquet", base, ids)
            cut = Column(path, "cut").integers(batch["cut"], base)
            length = dataset.offsets[user + 1] - dataset.offsets[user]
            good = (cut >= 0) & (cut <= length)
            Column(path, "cut").require(good, "in 0..the history's length", base, cut)
            values = {"user": user, "cut": cut, "target": _targets(ranked, path, spec, batch["target"], base)}
            if timed:
                values["time"] = Column(path, "time").integers(batch["time"], base)
            arrays.append(**values)
            bar.update(batch.num_rows)
    if spec.kind != "items":
        _tell_of_repeats(path, load(out, "user"), load(out, "cut"), dataset)


def _tell_of_repeats(path: Path, user: np.ndarray, cut: np.ndarray, dataset: Dataset) -> None:
    """Several labels of a user at one cut are learned, and counted, each; a join that has fanned out looks so too."""
    order = np.arange(len(user)) if ordered(user, cut) else np.lexsort((cut, user))
    user, cut = user[order], cut[order]
    if (twice := np.flatnonzero((user[1:] == user[:-1]) & (cut[1:] == cut[:-1]))).size:
        at = int(twice[0])
        rows, who = f"rows {order[at]} and {order[at + 1]}", int(dataset.user_id[user[at]])
        _LOG.warning(
            f"{path}: {twice.size:,} of {len(user):,} rows are a further label of a user at the same cut, "
            f"first user {who} in {rows}: each is learned and counted"
        )


def _ranked(dataset: Dataset, spec: TaskSpec) -> np.ndarray | None:
    """[V + 2] bool, which ids the task ranks: made once for all rows. None for other kinds."""
    if spec.kind != "items":
        return None
    ranked = np.ones(dataset.num_items + 2, bool)
    ranked[[0, -1]] = False
    if spec.catalogue is not None:
        ranked[:] = False
        ranked[np.array(spec.catalogue)] = True
    return ranked


def _targets(ranked: np.ndarray | None, path: Path, spec: TaskSpec, array, base: int) -> np.ndarray:
    column = Column(path, "target")
    if spec.kind == "regression":
        return column.floats(array, base)
    target = column.integers(array, base)
    if ranked is not None:
        what = f"an item id 1..{len(ranked) - 2}" if spec.catalogue is None else "an item of the task's catalogue"
        column.require(ranked[target.clip(0, len(ranked) - 1)], what, base, target)
    else:
        top = (spec.num_classes or 2) - 1
        column.require((target >= 0) & (target <= top), f"in 0..{top}", base, target)
    return target
