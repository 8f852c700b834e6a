"""The parts of a run's record that belong to single tasks, so that they can go when a task goes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

# Paths of dicts by task name.
_BY_TASK = (
    ("outputs",),
    ("references",),
    ("standard_error",),
    ("samples",),
    ("curves",),
    ("dataset", "tasks"),
    ("config", "tasks"),
)


def without_tasks(record: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """The record of a run that never learned the tasks `gone`: their row and column of the result matrix, their
    outputs, curves, references and settings are left out. What is not of that form stays as it is."""
    record = copy.deepcopy(dict(record))
    if not gone:
        return record
    for path in _BY_TASK:
        values: Any = record
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        if isinstance(values, dict):
            for name in gone:
                values.pop(name, None)
    matrix = record.get("matrix")
    if isinstance(matrix, dict) and {"tasks", "metric", "rows"} <= set(matrix):
        rows = zip(matrix["tasks"], matrix["rows"], strict=False)
        matrix["rows"] = [_without(row, gone) for name, row in rows if name not in gone]
        matrix["metric"] = _without(matrix["metric"], gone)
        matrix["tasks"] = [name for name in matrix["tasks"] if name not in gone]
    return record


def _without(values: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in gone}
