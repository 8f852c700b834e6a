"""User vectors or predictions of a whole dataset, in any number of processes, each of which may be killed at any time.

A shard is a run of at most SHARD_USERS users. What is made of it becomes one file in
<out>.parts, written under another name and renamed: that it bears its name is the mark that it is done. Whoever finds
all of them there puts them together, in order, as <out>, again by a rename, and removes the folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pcl_ext import store
from pcl_ext.data import Dataset
from pcl_ext.data._arrow import pa, pq
from pcl_ext.data.cache import release
from pcl_ext.data.writer import file_sha256
from pcl_ext.model.answers import check_k
from pcl_ext.progress import progress
from pcl_ext.serve.inputs import Histories
from pcl_ext.serve.item_ids import ItemIds, check_items
from pcl_ext.serve.predictor import Predictor, versions_of
from pcl_ext.serve.user_names import FILE as USERS
from pcl_ext.serve.user_names import UserNames, has_names
from pcl_ext.store.atomic import is_temporary, locked, sweep_temporary, temporary, whole
from pcl_ext.store.record import Record
from pcl_ext.task import TaskSpec

SHARD_USERS = 1 << 13
_KEY = b"pcl_ext"
_CLAIM = "job.json"
_LOCK = re.compile(r"rank-\d+-of-\d+\.lock|finish\.lock")
_PART = re.compile(r"part-\d{12}-\d{12}\.parquet")


@dataclass(frozen=True)
class Share:
    """What one process has done. users: those it read; unknown: ids dropped of these, of all once it is complete."""

    users: int
    unknown: int
    complete: bool


class DatasetJob:
    """Something of all users of a dataset, whole histories, into one Parquet file: user_id, then columns of its own,
    then original_id (string) where the dataset's users.parquet has it.

    The users are in the order of the dataset. Peak memory does not depend on their number. The same job, started again
    after whatever ended it, goes on where it stopped; it is the same if run, tasks, settings and dataset are.
    ValueError where `out` or its parts belong to another one, and where the dataset's items are not those of the run.

    fields    the columns beside those of the user; `columns` makes them of some histories
    settings  JSON values that the result depends on besides tasks and dataset
    """

    command: str
    doing: str

    def __init__(self, predictor: Predictor, dataset: Dataset, out: str | Path, tasks: Sequence[str] | None):
        self.predictor, self.dataset, self.out = predictor, dataset, Path(out).absolute()
        self.parts = self.out.with_name(self.out.name + ".parts")
        self.manifest = store.read_manifest(predictor.path)
        check_items(predictor.path, Record.from_json(self.manifest["record"]), dataset)
        files = {entry["name"]: entry["sha256"] for entry in self.manifest["tasks"]}
        self.tasks = list(files) if tasks is None else list(tasks)
        for name in self.tasks:
            if name not in files:
                raise ValueError(f"tasks must be among {', '.join(files) or '(no tasks yet)'}, got {name!r}")
        self.identity = {
            "backbone": self.manifest["backbone"]["hash"],
            "tasks": {name: files[name] for name in self.tasks},
            "dataset": dataset.sha256,
        }
        if settings := self.settings():
            self.identity["settings"] = settings
        self.names = UserNames(dataset) if has_names(dataset) else None
        self.schema = pa.schema([("user_id", pa.int64()), *self.fields()])
        if self.names is not None:
            self.identity["users"] = file_sha256(dataset.path / USERS)
            self.schema = self.schema.append(pa.field("original_id", pa.string()))

    def settings(self) -> dict[str, Any]:
        return {}

    def fields(self) -> list[tuple[str, pa.DataType]]:
        raise NotImplementedError

    def columns(self, histories: Histories) -> list[pa.Array]:
        raise NotImplementedError

    @cached_property
    def shards(self) -> list[range]:
        """Rows of the dataset, shard by shard."""
        last = self.dataset.num_users
        return [range(at, min(at + SHARD_USERS, last)) for at in range(0, last, SHARD_USERS)]

    def run(self, rank: int = 0, world_size: int = 1) -> Share:
        """Do this process's share, shards rank, rank + world_size, ..; the one that ends last writes `out`."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        users = unknown = 0
        if not (complete := self._finished()):
            self._check_model()
            self.parts.mkdir(parents=True, exist_ok=True)
            try:
                self._claim()
                with locked(self.parts / f"rank-{rank}-of-{world_size}.lock", "in use", "wait for it"):
                    sweep_temporary(self.parts)
                    label = f"{self.doing}, {rank + 1} of {world_size}"
                    users, unknown = self._write_parts(self.shards[rank::world_size], label)
                complete = self._finish()
            except FileNotFoundError:
                if not self._finished():
                    raise
                complete = True  # another process has put it together and removed the parts meanwhile
        return Share(users, self._metadata(self.out)["unknown"] if complete else unknown, complete)

    def _check_model(self) -> None:
        """What answers is what the identity says. The run may have been saved anew before or after the job was made."""
        opened, made = self.predictor.versions(self.tasks), versions_of(self.manifest)
        if any(opened.get(name) != made[name] for name in ("", *self.tasks)):
            raise ValueError(f"{self.predictor.path} has been saved anew meanwhile; start again, with a new Predictor")

    def _part(self, rows: range) -> Path:
        return self.parts / f"part-{rows.start:012}-{rows.stop:012}.parquet"

    def _claim(self) -> None:
        """The first of a job's processes says what it is; the others must be at the same."""
        path = self.parts / _CLAIM
        if not path.exists():
            others = [name for name in os.listdir(self.parts) if not (is_temporary(name) or _LOCK.fullmatch(name))]
            if others and not path.exists():  # nor has another process made them meanwhile
                what = f"{self.parts} holds {others[0]} and was not made by {self.command}"
                raise ValueError(f"{what}; move it, or choose another file")
            with temporary(self.parts) as file, suppress(FileExistsError):
                file.write(json.dumps(self.identity).encode())
                file.flush()
                os.fsync(file.fileno())
                _name_first(file.name, path)
        self._same(self._claimed(), self.parts)

    def _claimed(self) -> dict[str, Any]:
        """What the parts are of; nothing where their job.json is not ours."""
        try:
            values = json.loads((self.parts / _CLAIM).read_text())
        except ValueError:
            values = None
        return values if isinstance(values, dict) else {}

    def _same(self, then: dict[str, Any], where: Path) -> None:
        for key in [*self.identity, *(then.keys() - self.identity.keys())]:
            value = self.identity.get(key)
            if json.dumps(then.get(key)) != json.dumps(value):  # as text: the order of the tasks counts
                raise ValueError(
                    f"{where} was made from another {key} ({str(then.get(key)):.60}, now {str(value):.60}); remove it, "
                    "or choose another file"
                )

    def _finished(self) -> bool:
        """Whether `out` is there, made by this very job; sweeps what a process killed after its last step has left."""
        if not self.out.exists():
            return False
        self._same(self._metadata(self.out)["identity"], self.out)
        with suppress(FileNotFoundError, NotADirectoryError):
            if not (self.parts / _CLAIM).exists() or self._claimed() == self.identity:
                self._remove_parts()
        return True

    def _remove_parts(self) -> None:
        """Files of our naming, job.json last: while it is there the others are known as ours. The folder too, where
        nothing else is in it."""
        with suppress(OSError):
            for name in sorted(os.listdir(self.parts), key=lambda name: name == _CLAIM):
                if name == _CLAIM or is_temporary(name) or _LOCK.fullmatch(name) or _PART.fullmatch(name):
                    (self.parts / name).unlink(missing_ok=True)
            self.parts.rmdir()

    def _metadata(self, path: Path) -> dict[str, Any]:
        try:
            values = pq.read_schema(path).metadata or {}
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is there and is no Parquet file: {error}; choose another file") from error
        if _KEY not in values:
            raise ValueError(f"{path} is there and was not made by {self.command}; choose another file")
        return json.loads(values[_KEY])

    def _write_parts(self, shards: list[range], label: str) -> tuple[int, int]:
        """Those that are not there yet; how many users they hold, and how many ids of these were dropped."""
        users = unknown = 0
        with progress(label, sum(map(len, shards))) as bar:
            for rows in shards:
                if not self._part(rows).exists():
                    unknown += self._write_part(rows)
                    users += len(rows)
                bar.update(len(rows))
        return users, unknown

    def _write_part(self, rows: range) -> int:
        """How many unknown ids were dropped."""
        dataset, num_items = self.dataset, self.manifest["backbone"]["config"]["num_items"]
        offsets = np.array(dataset.offsets[rows.start : rows.stop + 1])
        items = np.array(dataset.items[offsets[0] : offsets[-1]])
        users = np.array(dataset.user_id[rows.start : rows.stop])
        for array in (dataset.items, dataset.offsets, dataset.user_id):
            release(array)
        names = [] if self.names is None else [self.names.of(rows)]
        columns = [pa.array(users), *self.columns(Histories(items, offsets - offsets[0])), *names]
        unknown = int(((items < 1) | (items > num_items)).sum())
        with self._writer(self._part(rows), unknown) as writer:
            writer.write_table(pa.table(columns, schema=self.schema))
        return unknown

    @contextmanager
    def _writer(self, path: Path, unknown: int) -> Iterator[pq.ParquetWriter]:
        """A Parquet file that is there under its name only once it is complete and on the disk."""
        schema = self.schema.with_metadata({_KEY: json.dumps({"identity": self.identity, "unknown": unknown})})
        packed = {"compression": "none", "use_dictionary": False}  # scores and vectors neither compress nor repeat
        with whole(path, self.parts) as file, pq.ParquetWriter(file, schema, **packed) as writer:
            yield writer

    def _finish(self) -> bool:
        """Put the parts together, if all are there and no other process is at it."""
        parts = [self._part(rows) for rows in self.shards]
        if not all(part.exists() for part in parts):
            return self._finished()  # another process may have removed them
        try:
            with locked(self.parts / "finish.lock", "being finished", "wait for it"):
                if self._finished():  # by another process, between our look at the parts and the lock
                    return True
                unknown = sum(self._metadata(part)["unknown"] for part in parts)
                with self._writer(self.out, unknown) as writer:
                    for part in parts:
                        writer.write_table(pq.read_table(part))
                self._remove_parts()
        except store.StoreError:
            return False  # another process is at it
        return True


class EncodeJob(DatasetJob):
    """User vectors: list<float32> a task. ValueError where tasks name a column twice, or one of the user's."""

    command, doing = "pcl encode", "encoding"

    def __init__(self, predictor: Predictor, dataset: Dataset, out: str | Path, tasks: Sequence[str] | None = None):
        super().__init__(predictor, dataset, out, tasks)
        if len(set(self.schema.names)) < len(self.schema.names):
            user = "user_id" if self.names is None else "user_id and original_id"
            raise ValueError(f"tasks name the columns beside {user}, each once, got {', '.join(self.tasks)}")

    def fields(self) -> list[tuple[str, pa.DataType]]:
        return [(name, pa.list_(pa.float32())) for name in self.tasks]

    def columns(self, histories: Histories) -> list[pa.Array]:
        vectors = self.predictor.encode(histories, self.tasks)
        return [_lists(vectors[name]) for name in self.tasks]


class PredictJob(DatasetJob):
    """Predictions of one task, as `Predictor.predict` answers: items and scores, lists of the best k, the best first
    (fewer where there are no more); class, its label where the task names them, and probabilities; probability; value.

    ids  items are the log's own in place of the dataset's
    """

    command, doing = "pcl predict", "predicting"

    def __init__(
        self,
        predictor: Predictor,
        dataset: Dataset,
        out: str | Path,
        task: str,
        k: int = 10,
        *,
        skip_seen: bool = False,
        ids: ItemIds | None = None,
    ):
        self.k, self.skip_seen, self.ids = check_k(k), skip_seen, ids
        super().__init__(predictor, dataset, out, [task])
        if ids is not None:
            check_items(predictor.path, Record.from_json(self.manifest["record"]), ids)

    @cached_property
    def spec(self) -> TaskSpec:
        (spec,) = (entry["spec"] for entry in self.manifest["tasks"] if entry["name"] == self.tasks[0])
        return TaskSpec.from_json(spec)

    def settings(self) -> dict[str, Any]:
        answer = {"answer": "predictions"}
        if self.spec.kind != "items":
            return answer
        names = None if self.ids is None else file_sha256(self.ids.path)
        return answer | {"k": self.k, "skip_seen": self.skip_seen, "item_ids": names}

    def fields(self) -> list[tuple[str, pa.DataType]]:
        if self.spec.kind == "items":
            item = pa.int64() if self.ids is None or self.ids.are_int64 else pa.string()
            return [("items", pa.list_(item)), ("scores", pa.list_(pa.float32()))]
        if self.spec.kind == "classes":
            label = [("label", pa.string())] if self.spec.labels else []
            return [("class", pa.int64()), *label, ("probabilities", pa.list_(pa.float32()))]
        return [("probability" if self.spec.kind == "binary" else "value", pa.float32())]

    def columns(self, histories: Histories) -> list[pa.Array]:
        answer = self.predictor.predict(histories, self.tasks[0], self.k, skip_seen=self.skip_seen)
        if self.spec.kind != "items":
            values = [answer[name] for name, _ in self.fields()]
            return [_lists(one) if one.ndim == 2 else pa.array(one) for one in values]
        there = answer["items"] > 0
        items, scores = (answer[name][there] for name in ("items", "scores"))
        offsets = pa.array(np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32))
        item = self.schema.field("items").type.value_type
        ids = items if self.ids is None else self.ids.original(items)
        ids = pa.array(map(str, ids) if pa.types.is_string(item) else ids, item)
        return [pa.ListArray.from_arrays(offsets, values) for values in (ids, pa.array(scores))]


def _name_first(draft: str, path: Path) -> None:
    """Give a file its name, or raise FileExistsError where another process was first."""
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        os.replace(draft, path)  # no hard links there: the last one's stays, and who reads another than its own stops


def _lists(vectors: np.ndarray) -> pa.ListArray:
    """[n, F] float32 -> n lists."""
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1)))
