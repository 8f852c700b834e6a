"""Predictor: a run that answers. One class for Python, the command line, torchrun and Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcl_ext import store
from pcl_ext.batch import PackedBatch
from pcl_ext.model import UserModel
from pcl_ext.model.answers import answer, check_k
from pcl_ext.serve.inputs import BATCH_TOKENS, Histories, frame_to_dict, read_histories


class Predictor:
    """Predictions and user vectors of a run, for any number of histories in any of the usual forms.

    Pickles as its settings: each process opens the run when it is first asked. Histories are those of `read_histories`:
    an Arrow table, a data frame, a dict of arrays, a list of lists; new users and empty histories included. Of each the
    newest max_len known ids are read; unknown ones are dropped and counted, in `unknown` (so far) and in each answer.
    Memory beyond input and answer does not depend on the number of histories: they are worked on in chunks.

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
        self._model: UserModel | None = None
        self._whole = False  # whether it has all tasks of the run
        self._check_tasks([task] if task is not None else self.tasks_encoded or ())

    def _check_tasks(self, names: Sequence[str]) -> None:
        """Early, from the manifest alone: a job of many workers must not find out in each of them."""
        known = [entry["name"] for entry in store.read_manifest(self.path)["tasks"]]
        for name in names:
            if name not in known:
                raise ValueError(f"task must be one of {', '.join(known) or '(no tasks yet)'}, got {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None, "_whole": False}

    @property
    def model(self) -> UserModel:
        """The run's model, opened when it is first asked for: of a predictor that was made for some tasks with these
        alone, until another one is asked for."""
        if self._model is None:
            named = self.tasks_encoded if self.task is None else (self.task,)
            self._model, self._whole = self._open(named), named is None
        return self._model

    def _open(self, tasks: Sequence[str] | None) -> UserModel:
        return store.from_pretrained(self.path, tasks).to(self.device)

    def _model_with(self, names: Sequence[str] | None) -> UserModel:
        """The model, with all tasks where it lacks one of these, or where all are asked for."""
        model = self.model
        if not self._whole and (names is None or not set(names) <= set(model.task_names)):
            model, self._whole = self._open(None), True
        self._model = model
        return model

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
        self._model_with([task]).task(task)
        check_k(k)
        parts = [
            answer(self.model, batch, task, k, skip_seen=skip_seen) | {"unknown": unknown}
            for unknown, batch in self._batches(read_histories(histories, self.column))
        ]
        return _joined(parts)

    @torch.no_grad()
    def encode(self, histories: Any, tasks: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """User vectors [B, F] float32 for each of the tasks (all by default): what its head reads."""
        model, batches = self._model_with(tasks), self._batches(read_histories(histories, self.column))
        return _joined(
            [
                {name: vectors.float().cpu().numpy() for name, vectors in model.encode(batch, tasks).items()}
                for _, batch in batches
            ]
        )

    def _batches(self, histories: Histories) -> Iterator[tuple[np.ndarray, PackedBatch]]:
        """Chunk by chunk: how many ids of each history are unknown, and the others."""
        config = self.model.backbone.config
        for rows in histories.chunks(BATCH_TOKENS, config.max_len):
            known, unknown = histories.known(rows, config.num_items)
            self.unknown += int(unknown.sum())
            yield unknown, known.batch(config.max_len).to(self.model.device)


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
