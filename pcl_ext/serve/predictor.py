"""Predictor: a run that answers. One class for Python, the command line, torchrun and Ray Data."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcl_ext import store
from pcl_ext.batch import PackedBatch
from pcl_ext.model import UserModel
from pcl_ext.model.answers import answer, check_k
from pcl_ext.serve.inputs import BATCH_TOKENS, Histories, frame_to_dict, read_histories


@dataclass(frozen=True)
class _Opened:
    """A run as it was read.

    whole     whether the model has all tasks of it
    versions  `versions_of` the manifest that it was read by
    """

    model: UserModel
    whole: bool
    versions: dict[str, str]

    def has(self, names: Iterable[str] | None) -> bool:
        """Whether it will do for these tasks, None for all."""
        return self.whole or (names is not None and all(name in self.model.tasks for name in names))


def versions_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What tells one save of a run from another: sha256 of each task's file by its name, of the backbone's by ""."""
    return {"": manifest["backbone"]["sha256"]} | {entry["name"]: entry["sha256"] for entry in manifest["tasks"]}


class Predictor:
    """Predictions and user vectors of a run, for any number of histories in any of the usual forms.

    Pickles as its settings: each process opens the run when it is first asked. Histories are those of `read_histories`:
    an Arrow table, a data frame, a dict of arrays, a list of lists; new users and empty histories included. Of each the
    backbone reads the newest max_len known ids; unknown ones are dropped and counted, in `unknown` (so far) and in each
    answer.
    Memory beyond input and answer does not depend on the number of histories: they are worked on in chunks. Any number
    of threads may ask at once: one opens the run, the others wait for it.

    path       the run's folder
    task       what `predictor(batch)` predicts, or
    encode     the tasks whose user vectors `predictor(batch)` gives
    k          how many items an items task answers
    skip_seen  leave out the items of the history given, all of it; a rank without an item holds item 0, score -inf
    column     the list column of a table, or the key of a dict, with the histories
    keep       columns that `predictor(batch)` hands on, such as ("user_id",)
    device     where the model lies, such as "cuda"; answers are on the CPU

    StoreError where the folder is no run, ValueError for a task it does not know.
    """

    def __init__(
        self,
        path: str | Path,
        task: str | None = None,
        *,
        encode: Sequence[str] | None = None,
        k: int = 10,
        skip_seen: bool = False,
        column: str = "items",
        keep: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ):
        if task is not None and encode is not None:
            raise ValueError("give task, to predict, or encode, for user vectors, not both")
        if isinstance(encode, str) or isinstance(keep, str):
            raise TypeError("encode and keep must be lists of names, got a str")
        self.path = Path(path).absolute()
        self.task, self.tasks_encoded = task, None if encode is None else tuple(encode)
        self.k, self.skip_seen, self.column, self.keep = check_k(k), skip_seen, column, tuple(keep)
        self.unknown, self.device = 0, device
        self._opened: _Opened | None = None
        self._make_locks()
        self._check_tasks([task] if task is not None else self.tasks_encoded or ())

    def _check_tasks(self, names: Sequence[str]) -> None:
        """Early, from the manifest alone: a job of many workers must not find out in each of them."""
        known = [entry["name"] for entry in store.read_manifest(self.path)["tasks"]]
        for name in names:
            if name not in known:
                raise ValueError(f"task must be one of {', '.join(known) or '(no tasks yet)'}, got {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_lock")} | {"_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_locks()

    def _make_locks(self) -> None:
        self._open_lock, self._count_lock = threading.Lock(), threading.Lock()

    @property
    def model(self) -> UserModel:
        """The run's model, opened when it is first asked for: of a predictor that was made for some tasks with these
        alone, until another one is asked for."""
        return self._with(()).model

    def is_current(self) -> bool:
        """Whether the run is still the one that is open here, if any is: `pcl learn` may have saved it anew. What is
        open goes on answering; a new Predictor opens what is there now. StoreError where the folder is no run."""
        return self._opened is None or self._opened.versions == versions_of(store.read_manifest(self.path))

    def versions(self, names: Sequence[str]) -> dict[str, str]:
        """`versions_of` the run that answers for these tasks."""
        return self._with(names).versions

    def _with(self, names: Sequence[str] | None) -> _Opened:
        """What is open, with all tasks where it lacks one of these, or where all are asked for."""
        if self._opened is None or not self._opened.has(names):
            with self._open_lock:
                if self._opened is None or not self._opened.has(names):  # nor has another thread opened it meanwhile
                    own = (self.tasks_encoded or ()) if self.task is None else (self.task,)
                    mine = self._opened is None and bool(own) and names is not None and all(n in own for n in names)
                    self._opened = self._open(own if mine else None)
        return self._opened

    def _open(self, tasks: Sequence[str] | None) -> _Opened:
        """Once more where the run is saved meanwhile: the next save may sweep what is being read."""
        while True:
            now = versions_of(store.read_manifest(self.path))
            try:
                model = store.from_pretrained(self.path, tasks).to(self.device)
            except (store.StoreError, FileNotFoundError):
                if versions_of(store.read_manifest(self.path)) == now:
                    raise
            else:
                if versions_of(store.read_manifest(self.path)) == now:
                    return _Opened(model, tasks is None, now)

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        """What the constructor was asked for, and before it the columns to `keep`: for `map_batches` and the like."""
        if self.task is None and self.tasks_encoded is None:
            raise ValueError("a Predictor that is called needs a task, or encode; or use its methods")
        batch = frame_to_dict(batch)
        kept = {name: _column(batch, name) for name in self.keep}
        histories = read_histories(batch, self.column)
        for name, values in kept.items():
            if len(values) != len(histories):
                raise ValueError(f"{name} must be as long as the histories, {len(histories)}, got {len(values)}")
        if self.task is not None:
            answer = self.predict(histories, self.task, self.k, skip_seen=self.skip_seen)
        else:
            answer = self.encode(histories, self.tasks_encoded)
        if twice := sorted(kept.keys() & answer.keys()):
            raise ValueError(f"keep must not name what the answer holds itself, got {', '.join(twice)}")
        return kept | answer

    @torch.no_grad()
    def predict(self, histories: Any, task: str, k: int = 10, *, skip_seen: bool = False) -> dict[str, np.ndarray]:
        """Predictions for B histories, as arrays of length B.

        items: items [B, k] int64, scores [B, k] float32 (k at most the catalogue), equal scores by the lowest id;
        classes: class [B] int64, its label [B] where the task names them, probabilities [B, C] float32; binary:
        probability [B] float32; regression: value [B] float32. With each: unknown [B] int64, how many ids were dropped.
        """
        model = self._with([task]).model
        model.task(task)
        check_k(k)
        parts = [
            answer(model, batch, task, k, skip_seen=skip_seen) | {"unknown": unknown}
            for unknown, batch in self._batches(model, read_histories(histories, self.column))
        ]
        return _joined(parts)

    @torch.no_grad()
    def encode(self, histories: Any, tasks: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """User vectors [B, F] float32 for each of the tasks (all by default): what its head reads."""
        tasks = None if tasks is None else _names(tasks)
        model = self._with(tasks).model
        batches = self._batches(model, read_histories(histories, self.column))
        return _joined(
            [
                {name: vectors.float().cpu().numpy() for name, vectors in model.encode(batch, tasks).items()}
                for _, batch in batches
            ]
        )

    def _batches(self, model: UserModel, histories: Histories) -> Iterator[tuple[np.ndarray, PackedBatch]]:
        """Chunk by chunk: how many ids of each history are unknown, and the others."""
        config = model.backbone.config
        for rows in histories.chunks(BATCH_TOKENS, config.max_len):
            known, unknown = histories.known(rows, config.num_items)
            with self._count_lock:
                self.unknown += int(unknown.sum())
            yield unknown, known.batch(config.max_len).to(model.device)


def _names(tasks: Iterable[str]) -> list[str]:
    if isinstance(tasks, (str, bytes)) or not isinstance(tasks, Iterable):
        raise TypeError(f"tasks must be a list of names, got the {type(tasks).__name__} {tasks!r:.80}")
    return list(tasks)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _column(batch: Any, name: str) -> np.ndarray:
    is_arrow = type(batch).__module__.partition(".")[0] == "pyarrow"
    names = batch.schema.names if is_arrow else list(batch) if isinstance(batch, Mapping) else []
    if name not in names:
        raise ValueError(f"keep names {name!r}, the batch has {', '.join(map(str, names)) or 'no columns'}")
    if not is_arrow:
        return np.asarray(batch[name])
    column = batch.column(name)
    return column.to_numpy() if hasattr(column, "chunks") else column.to_numpy(zero_copy_only=False)
