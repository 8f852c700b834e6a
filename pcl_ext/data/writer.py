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
_FOLD = pa.array(FOLDS)


class DatasetWriter:
    """Builds a dataset in a temporary folder beside `out` and renames it there as the last step.

    Use as a context manager: leaving it normally commits, an exception removes what was written, and what a killed
    process left behind is swept by the next writer of the same `out`. Each append is one Parquet row group.
    """

    def __init__(self, out: str | Path, name: str, num_items: int, check: Callable[[Path], object] | None = None):
        """`check` is called with the finished folder before it is renamed; where it raises nothing is kept."""
        self.out = Path(out).absolute()
        if self.out.is_symlink() or (self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir()))):
            raise FileExistsError(f"out must be a new or an empty folder, got {self.out}")
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}")
        self.header: dict[str, Any] = {"format": FORMAT, "name": name, "num_items": int(num_items)}
        self.check = check
        self.counts: dict[str, Any] = {"users": dict.fromkeys(FOLDS, 0), "events": 0, "tasks": {}}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._specs: set[str] = set()

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
        """user_id [n], items [t] oldest first, offsets [n + 1], fold [n] 0..2, times [t] or None: n more users."""
        columns = {
            "user_id": pa.array(np.asarray(user_id, np.int64)),
            "items": _lists(offsets, np.asarray(items, np.int32)),
            "fold": _FOLD.take(pa.array(np.asarray(fold, np.int64))),
        }
        if times is not None:
            columns["times"] = _lists(offsets, np.asarray(times, np.int64))
        self._append("histories.parquet", pa.table(columns))
        for name, count in zip(FOLDS, np.bincount(fold, minlength=3).tolist(), strict=True):
            self.counts["users"][name] += count
        self.counts["events"] += len(items)

    def items(self, item_id, original_id) -> None:
        """item_id [n], original_id: n strings."""
        table = {"item_id": pa.array(np.asarray(item_id, np.int32)), "original_id": pa.array(original_id, pa.string())}
        self._append("items.parquet", pa.table(table))

    def users(self, user_id, original_id) -> None:
        """user_id [n], original_id: n strings; only where a log's own user ids are not integers."""
        table = {"user_id": pa.array(np.asarray(user_id, np.int64)), "original_id": pa.array(original_id, pa.string())}
        self._append("users.parquet", pa.table(table))

    def task(self, spec: TaskSpec, user_id, target, cut, time=None, labels=None) -> None:
        """user_id [m], target [m], cut [m], time [m] or None: m more rows of the task's table.

        labels  what the classes 0..C-1 (or 0 and 1) are called, kept in the task's json
        """
        if spec.name not in self._specs:
            values = spec.to_json() | ({} if labels is None else {"labels": list(labels)})
            _write_json(self.folder / "tasks" / f"{spec.name}.json", values)
            self._specs.add(spec.name)
        dtype = np.float32 if spec.kind == "regression" else np.int64
        columns = {
            "user_id": pa.array(np.asarray(user_id, np.int64)),
            "target": pa.array(np.asarray(target, dtype)),
            "cut": pa.array(np.asarray(cut, np.int32)),
        }
        if time is not None:
            columns["time"] = pa.array(np.asarray(time, np.int64))
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
        os.rename(self.folder, self.out)
        sync_one(self.out.parent)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    digest = sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def source(path: str | Path) -> dict[str, Any]:
    """What dataset.json keeps of a file the dataset was made from."""
    return {"file": Path(path).name, "bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def _lists(offsets, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.asarray(offsets, np.int32)), pa.array(values))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
