"""What a report shows, gathered from a run's manifest. Any part of the record may be missing; then a note says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pcl_ext.metrics import ResultMatrix, higher_is_better
from pcl_ext.store.record import Record


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
    record: Record


def gather(manifest: Mapping[str, Any]) -> Content:
    """Everything to show, from what `read_manifest` returned."""
    record = Record.from_json(manifest["record"])
    matrix = ResultMatrix.from_json(record.matrix) if record.matrix else None
    if matrix is not None and not matrix.rows:
        matrix = None
    tasks = [_task(entry, record, matrix) for entry in manifest["tasks"]]
    return Content(record.dataset.get("name", ""), matrix, tasks, manifest["backbone"]["bytes"], record)


def _task(entry: Mapping[str, Any], record: Record, matrix: ResultMatrix | None) -> TaskResult:
    name, spec = entry["name"], entry["spec"]
    task = TaskResult(name, spec["kind"], spec["metric"], entry["bytes"])
    task.curve = record.curves.get(name, [])
    if matrix is None or name not in matrix.rows[-1]:
        return task
    task.metric, task.metrics = matrix.metric[name], matrix.rows[-1][name]
    task.value = task.metrics[task.metric]
    task.errors = record.standard_error.get(name, {})
    task.error = task.errors.get(task.metric)
    for key, reference in record.references.get(name, {}).items():
        if task.metric in reference["metrics"]:
            task.references[key] = (reference["name"], reference["metrics"][task.metric])
    return task
