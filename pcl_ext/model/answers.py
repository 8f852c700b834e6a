"""What a user model answers: arrays over many histories, or a plain dict for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pcl_ext.batch import PackedBatch
from pcl_ext.model.task_module import Task
from pcl_ext.model.top_items import top_items

if TYPE_CHECKING:
    from pcl_ext.model.user_model import UserModel


def answer(
    model: UserModel, batch: PackedBatch, name: str, k: int, *, skip_seen: bool = False
) -> dict[str, np.ndarray]:
    """Predictions for the B histories of a batch, as arrays of length B: `Predictor.predict` says which."""
    task = model.task(name)
    if task.spec.kind == "items":
        read = model.read(batch, name)
        items, scores = top_items(task, read, model.backbone.table, k, skip_seen=skip_seen)
        return {"items": items.cpu().numpy(), "scores": scores.cpu().numpy()}
    return _label_answer(task, model(batch, name).float().cpu())


def as_rows(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Arrays of predictions as a plain dict a history; ranks without an item are left out."""
    if "items" in arrays:
        counts = (arrays["items"] > 0).sum(1).tolist()
        pairs = zip(arrays["items"].tolist(), arrays["scores"].tolist(), counts)
        return [{"items": items[:n], "scores": scores[:n]} for items, scores, n in pairs]
    columns = {name: values.tolist() for name, values in arrays.items() if name != "unknown"}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def check_k(k: int) -> int:
    """How many items are asked for; ValueError where it is no whole number from 1 up."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool):
        raise ValueError(f"k must be a whole number, got {k!r:.80}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    return int(k)


def _label_answer(task: Task, output: Tensor) -> dict[str, np.ndarray]:
    spec = task.spec
    if spec.kind == "classes":
        number = output.argmax(1).numpy()
        label = {} if spec.labels is None else {"label": np.array(spec.labels)[number]}
        return {"class": number, **label, "probabilities": output.softmax(1).numpy()}
    return {"probability": output.sigmoid().numpy()} if spec.kind == "binary" else {"value": output.numpy()}
