"""What a task is: a name, a kind, and what it predicts. A value, never a class of its own."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

METRICS = {
    "items": ("mrr@5", "ndcg@10", "hr@10"),
    "binary": ("auc", "log_loss", "accuracy"),
    "classes": ("accuracy", "macro_f1"),
    "regression": ("rmse", "mae"),
}
_TYPES = {"kind": str, "description": str, "metric": str, "num_classes": int, "repeats": bool}
_NAME = re.compile(r"[a-z0-9_-]{1,64}")


def check_task_name(name: str) -> str:
    """Return `name` if it may name a task (and so a file), raise otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"a task's name must be a str, got {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"a task's name must match [a-z0-9_-]{{1,64}}, got {name!r}")
    return name


@dataclass(frozen=True)
class TaskSpec:
    """One prediction problem.

    name         matches [a-z0-9_-]{1,64}
    kind         items (rank the catalogue), binary, classes or regression
    description  a sentence; contextual prompts read it
    metric       the metric that is reported and that stops training; left out, the first of the kind
    num_classes  for classes only
    catalogue    for items only: the item ids (1..V) that are ranked, in column order; None ranks all of 1..V
    repeats      for items only: a target may be an item of the visible history
    labels       for classes and binary only: what the classes 0..C-1, or 0 and 1, are called
    """

    name: str
    kind: str
    description: str = ""
    metric: str = ""
    num_classes: int | None = None
    catalogue: tuple[int, ...] | None = None
    repeats: bool = False
    labels: tuple[str, ...] | None = None

    def __post_init__(self):
        check_task_name(self.name)
        for key, kind in _TYPES.items():
            self._check_type(key, kind)
        if self.kind not in METRICS:
            raise ValueError(f"kind of task {self.name!r} must be one of {', '.join(METRICS)}, got {self.kind!r}")
        metric = self.metric or METRICS[self.kind][0]
        if metric not in METRICS[self.kind]:
            options = ", ".join(METRICS[self.kind])
            raise ValueError(f"metric of task {self.name!r} ({self.kind}) must be one of {options}, got {metric!r}")
        object.__setattr__(self, "metric", metric)
        if (self.kind == "classes") != (self.num_classes is not None):
            raise ValueError(f"num_classes is given for classes and only there, got {self.num_classes} ({self.kind})")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes of task {self.name!r} must be at least 2, got {self.num_classes}")
        if self.kind != "items" and (self.catalogue is not None or self.repeats):
            raise ValueError(f"catalogue and repeats are for items only, task {self.name!r} is {self.kind}")
        if self.catalogue is not None:
            object.__setattr__(self, "catalogue", _check_catalogue(self.name, self.catalogue))
        if self.labels is not None:
            object.__setattr__(self, "labels", self._check_labels())

    def _check_type(self, key: str, kind: type) -> None:
        value = getattr(self, key)
        if key in ("metric", "num_classes") and value is None:
            return
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{key} of task {self.name!r} must be of type {kind.__name__}, got {value!r}")

    def _check_labels(self) -> tuple[str, ...]:
        count = {"binary": 2, "classes": self.num_classes}.get(self.kind)
        if count is None:
            raise ValueError(f"labels are for classes and binary only, task {self.name!r} is {self.kind}")
        if not isinstance(self.labels, (list, tuple)) or len(self.labels) != count:
            raise ValueError(f"labels of task {self.name!r} must be a list of {count} names, got {self.labels!r:.80}")
        return tuple(str(label) for label in self.labels)

    def num_outputs(self, num_items: int) -> int:
        """Columns of the task's output for a backbone that knows `num_items` items."""
        if self.kind == "items":
            return num_items if self.catalogue is None else len(self.catalogue)
        return self.num_classes or 1

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values, without those that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("catalogue", "labels"):
            values[key] = None if values[key] is None else list(values[key])
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TaskSpec:
        """What `to_json` gave; ValueError for keys that a task does not have."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown keys of a task: {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


def _check_catalogue(name: str, catalogue: Any) -> tuple[int, ...]:
    if isinstance(catalogue, str | bytes | dict) or not isinstance(catalogue, Iterable):
        raise TypeError(f"catalogue of task {name!r} must be a list of item ids, got {catalogue!r:.80}")
    items = tuple(catalogue)
    for item in items:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(f"catalogue of task {name!r} must hold integers, got {item!r}")
    ids = tuple(map(operator.index, items))
    if not ids:
        raise ValueError(f"catalogue of task {name!r} must not be empty")
    if min(ids) < 1:
        raise ValueError(f"catalogue of task {name!r} holds item ids from 1 up, got {min(ids)}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"catalogue of task {name!r} must not name an item twice")
    return ids
