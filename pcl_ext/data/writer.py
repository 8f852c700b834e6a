"""Writing a dataset folder: streaming, and all or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pcl_ext.data._arrow import pa, pq
from pcl_ext.data.split import FOLDS
from pcl_ext.data.work_folder import sync, sync_one, work_folder
from pcl_ext.task import TaskSpec

FORMAT = 1
_INT32 = 2**31 - 1
_FOLD = pa.array(FOLDS)


class DatasetWriter:
    """Builds a dataset in a temporary folder beside `out` and renames it there as the last step.

    Use as a context manager: leaving it normally commits, an exception removes what was written, and what a killed
    process left behind is swept by the next writer of the same `out`. Each append is one Parquet row group.
    """

    def __init__(self, out: str | Path, name: str, num_items: int, check: Callable[[Path], object] | None = None):
        """`check` is called with the finished folder before it is renamed; where it raises nothing is kept."""
        self.out = Path(out).absolute()
        check_out(self.out)
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}")
        self.header: dict[str, Any] = {"format": FORMAT, "name": name, "num_items": int(num_items)}
        self.check = check
        self.counts: dict[str, Any] = {"users": dict.fromkeys(FOLDS, 0), "events": 0, "tasks": {}}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._specs: dict[str, TaskSpec] = {}

    def __enter__(self) -> DatasetWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._work = work_folder(self.out.parent, f".{self.out.name}.tmp-")
        self.folder = self._work.__enter__()
        self.folder.chmod(0o755)
        (self.folder / "tasks").mkdir()
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            for writer in self._writers.values():
                writer.close()
            if kind is None:
                self._commit()
        finally:
            self._work.__exit__(None, None, None)

    def histories(self, user_id, items, offsets, fold, times=None) -> None:
        """user_id [n], items [t] in 1..V, oldest first, offsets [n + 1], fold [n] 0..2, times [t] or None: n users.

        User u of this call owns items[offsets[u] : offsets[u + 1]]: offsets start at 0, never decrease and end at t.
        ValueError names what is otherwise, and for anything but integers.
        """
        user_id, fold = _integers("user_id", user_id), _integers("fold", fold, 0, len(FOLDS) - 1)
        items = _integers("items", items, 1, self.header["num_items"], np.int32)
        offsets = _integers("offsets", offsets, 0, _INT32)
        if not len(user_id) == len(fold) == len(offsets) - 1:
            got = f"{len(user_id)}, {len(fold)} and {len(offsets)}"
            raise ValueError(f"user_id and fold must be [n] and offsets [n + 1], got {got} values")
        if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
            got = f"{offsets[0]}..{offsets[-1]}" + (", decreasing" if (np.diff(offsets) < 0).any() else "")
            raise ValueError(f"offsets must start at 0, never decrease and end at len(items), {len(items)}; got {got}")
        columns = {
            "user_id": pa.array(user_id),
            "items": _lists(offsets, items),
            "fold": _FOLD.take(pa.array(fold)),
        }
        if times is not None:
            times = _integers("times", times)
            if len(times) != len(items):
                raise ValueError(f"times must be as many as items, {len(items)}, got {len(times)}")
            columns["times"] = _lists(offsets, times)
        self._append("histories.parquet", pa.table(columns))
        for name, count in zip(FOLDS, np.bincount(fold, minlength=3).tolist(), strict=True):
            self.counts["users"][name] += count
        self.counts["events"] += len(items)

    def items(self, item_id, original_id) -> None:
        """item_id [n], original_id: n strings, a list or an Arrow array."""
        item_id = _integers("item_id", item_id, 1, self.header["num_items"]).astype(np.int32)
        self._append("items.parquet", pa.table({"item_id": item_id, "original_id": _texts(original_id)}))

    def users(self, user_id, original_id) -> None:
        """user_id [n], original_id: as that of `items`; only where a log's own user ids are not integers."""
        table = {"user_id": _integers("user_id", user_id), "original_id": _texts(original_id)}
        self._append("users.parquet", pa.table(table))

    def task(self, spec: TaskSpec, user_id, target, cut, time=None) -> None:
        """user_id [m], target [m], cut [m], time [m] or None: m more rows of the task's table."""
        if spec.name not in self._specs:
            _write_json(self.folder / "tasks" / f"{spec.name}.json", spec.to_json())
            self._specs[spec.name] = spec
        if self._specs[spec.name] != spec:
            raise ValueError(f"task {spec.name!r} was begun as {self._specs[spec.name]}, got {spec}")
        target = np.asarray(target, np.float32) if spec.kind == "regression" else _integers("target", target)
        columns = {
            "user_id": pa.array(_integers("user_id", user_id)),
            "target": pa.array(target),
            "cut": pa.array(_integers("cut", cut, 0, _INT32).astype(np.int32)),
        }
        if time is not None:
            columns["time"] = pa.array(_integers("time", time))
        if len({len(column) for column in columns.values()}) > 1:
            got = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            raise ValueError(f"the columns of task {spec.name!r} must be of one length, got {got}")
        self._append(f"tasks/{spec.name}.parquet", pa.table(columns))
        self.counts["tasks"][spec.name] = self.counts["tasks"].get(spec.name, 0) + len(columns["target"])

    def _append(self, name: str, table: pa.Table) -> None:
        if name not in self._writers:
            self._writers[name] = pq.ParquetWriter(self.folder / name, table.schema, compression="zstd")
        self._writers[name].write_table(table, row_group_size=max(1, table.num_rows))

    def _commit(self) -> None:
        if "histories.parquet" not in self._writers:
            raise ValueError("a dataset needs at least one history, got none")
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        hashes = {p.relative_to(self.folder).as_posix(): file_sha256(p) for p in files}
        _write_json(self.folder / "dataset.json", self.header | {"counts": self.counts, "sha256": hashes})
        if self.check is not None:
            self.check(self.folder)
        sync(self.folder)
        try:
            os.rename(self.folder, self.out)
        except OSError:
            check_out(self.out)  # another writer was first
            raise
        sync_one(self.out.parent)


def check_out(out: str | Path) -> None:
    """Raise FileExistsError unless `out` is a new or an empty folder, PermissionError where it cannot be made."""
    out = Path(out).absolute()
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"out must be a new or an empty folder, got {out}")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"out must lie in a folder that can be written, {parent} is none")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    digest = sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_recorded(path: Path, recorded: str | None, digest: str) -> None:
    """ValueError where dataset.json records another sha256 of a file than it has now."""
    if recorded is not None and digest != recorded:
        raise ValueError(
            f"{path} must have the sha256 that dataset.json gives, {recorded}, got {digest}: put the file back, or, "
            'where it was changed on purpose, remove its entry from "sha256" in dataset.json'
        )


def source(path: str | Path) -> dict[str, Any]:
    """What dataset.json keeps of a file the dataset was made from."""
    return {"file": Path(path).name, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def _integers(name: str, values, low: int = -(2**63), high: int = 2**63 - 1, dtype=np.int64) -> np.ndarray:
    """values [n] as `dtype`, every one in low..high. ValueError for what a conversion would round or wrap around."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise ValueError(f"{name} must be integers [n], got {array.dtype} {list(array.shape)}")
    if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {array.min()}..{array.max()}")
    return array.astype(dtype, copy=False)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _texts(values) -> pa.Array:
    return values.cast(pa.string()) if isinstance(values, pa.Array) else pa.array(values, pa.string())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
