"""What a report shows, gathered from a run's manifest. Any part of the record may be missing; then a note says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pcl_ext.metrics import ResultMatrix, higher_is_better


@dataclass
class TaskResult:
    """One task after the last one was learned. None where the record does not say.

    size   bytes of its file
    curve  epochs: {"epoch", "loss", "valid": {metric: value}, "best"}
    """

    name: str
    kind: str
    metric: str
    size: int
    description: str = ""
    value: float | None = None
    error: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    references: dict[str, tuple[str, float]] = field(default_factory=dict)  # trivial, cheap: (name, value)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def gain(self, reference: str) -> float | None:
        """How much better than trivial or cheap, in the metric's units."""
        if self.value is None or reference not in self.references:
            return None
        difference = self.value - self.references[reference][1]
        return difference if higher_is_better(self.metric) else -difference


@dataclass
class Content:
    """title is the dataset's name or empty; tasks: a result for every task of the run; sizes in bytes."""

    title: str
    matrix: ResultMatrix | None
    tasks: list[TaskResult]
    backbone_size: int
    record: dict[str, Any]
    notes: list[str]


def gather(manifest: Mapping[str, Any]) -> Content:
    """Everything to show, from what `read_manifest` returned."""
    record, notes = manifest["record"], []
    matrix = _matrix(record, notes)
    tasks = [_task(entry, record, matrix) for entry in manifest["tasks"]]
    title = _text(_part(record, "dataset").get("name"))
    return Content(title, matrix, tasks, manifest["backbone"]["bytes"], record, notes)


def _matrix(record: Mapping[str, Any], notes: list[str]) -> ResultMatrix | None:
    if "matrix" not in record:
        return None
    try:
        matrix = ResultMatrix.from_json(record["matrix"])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        notes.append(f"The record's result matrix cannot be read: {error}")
        return None
    return matrix if matrix.rows else None


def _task(entry: Mapping[str, Any], record: Mapping[str, Any], matrix: ResultMatrix | None) -> TaskResult:
    name, spec = entry["name"], entry["spec"]
    task = TaskResult(
        name, _text(spec.get("kind")), _text(spec.get("metric")), entry["bytes"], _text(spec.get("description"))
    )
    task.curve = _curve(_part(record, "curves").get(name))
    if matrix is None or name not in matrix.rows[-1]:
        return task
    task.metric, task.metrics = matrix.metric[name], matrix.rows[-1][name]
    task.value = task.metrics[task.metric]
    task.errors = _numbers(_part(record, "standard_error").get(name))
    task.error = task.errors.get(task.metric)
    for key in ("trivial", "cheap"):
        reference = _part(_part(_part(record, "references"), name), key)
        value = _numbers(reference.get("metrics")).get(task.metric)
        if value is not None:
            task.references[key] = (_text(reference.get("name")) or key, value)
    return task


def _curve(curve: Any) -> list[dict[str, Any]]:
    """Epochs with numbers in them; anything else is dropped."""
    epochs = []
    for place, point in enumerate(curve if isinstance(curve, list) else []):
        if not isinstance(point, dict):
            continue
        epoch, loss = (_number(point.get(key)) for key in ("epoch", "loss"))
        valid = _numbers(point.get("valid"))
        epochs.append(
            {
                "epoch": place if epoch is None else epoch,
                "loss": loss,
                "valid": valid,
                "best": point.get("best") is True,
            }
        )
    return epochs


def _part(record: Any, key: str) -> Mapping[str, Any]:
    part = record.get(key) if isinstance(record, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _numbers(values: Any) -> dict[str, float]:
    values = values if isinstance(values, Mapping) else {}
    numbers = {key: _number(value) for key, value in values.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _text(value: Any) -> str:
    return "" if value is None else str(value)
