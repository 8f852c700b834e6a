"""R[i, j]: how well task j is done after task i was learned. Stored whole; forgetting is derived from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from pcl_ext.task import METRICS

LOWER_IS_BETTER = frozenset({"log_loss", "rmse", "mae"})
_KNOWN = frozenset(name for names in METRICS.values() for name in names)
_DEFINITIONS = {"first-last": "first - last", "max-last": "max - last"}


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of `metric` is the better one."""
    if metric not in _KNOWN:
        raise ValueError(f"metric must be one of {', '.join(sorted(_KNOWN))}, got {metric!r}")
    return metric not in LOWER_IS_BETTER


class ResultMatrix:
    """Tasks in the order they are learned, the metric each is reported in, and one row of results after each.

    Row i holds tasks 0..i: {task: {metric: value}}. Tasks are named by position or by name.
    """

    def __init__(self, tasks: Iterable[str] = (), metric: Mapping[str, str] | None = None):
        self.tasks: list[str] = []
        self.metric: dict[str, str] = {}
        self.rows: list[dict[str, dict[str, float]]] = []
        for task in tasks:
            if metric is None or task not in metric:
                raise ValueError(f"metric must name the metric of every task, got none for {task!r}")
            self.add(task, metric[task])

    def add(self, task: str, metric: str) -> None:
        """Name the task that is learned next."""
        higher_is_better(metric)
        if task in self.metric:
            raise ValueError(f"task must not be in the matrix yet, got {task!r} again")
        self.tasks.append(task)
        self.metric[task] = metric

    def append(self, row: Mapping[str, Mapping[str, float]]) -> None:
        """Add the results after the next task: {task: {metric: finite value}} of it and all tasks before it."""
        want = self.tasks[: len(self.rows) + 1]
        if len(want) == len(self.rows):
            raise ValueError(f"a matrix of {len(want)} tasks has {len(want)} rows, got one more: add the task first")
        if set(row) != set(want):
            raise ValueError(f"row {len(self.rows)} must hold the tasks {want}, got {sorted(row)}")
        kept = {task: {name: float(value) for name, value in row[task].items()} for task in want}
        for task, values in kept.items():
            if (metric := self.metric[task]) not in values:
                raise ValueError(f"row {len(self.rows)} must hold {metric} of task {task!r}, got {sorted(values)}")
            if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                raise ValueError(f"results of task {task!r} must be finite, got {bad[0]} = {values[bad[0]]}")
        self.rows.append(kept)

    def value(self, after: int | str, task: int | str, metric: str | None = None) -> float:
        """R[after, task] in the task's own metric, or in another one that was measured; negative positions count from
        the end."""
        after, task = self._position(after, "after"), self._position(task, "task")
        if task > after or after >= len(self.rows):
            known = f"has rows {task}..{len(self.rows) - 1}" if task < len(self.rows) else "has no row yet"
            raise IndexError(f"task {task} {known}, got row {after}")
        name = self.tasks[task]
        values, metric = self.rows[after][name], metric or self.metric[name]
        if metric not in values:
            raise ValueError(f"metric of task {name!r} must be one of {', '.join(values)}, got {metric!r}")
        return values[metric]

    def forgetting(self, definition: str = "first-last") -> dict[str, Any]:
        """{"definition", "tasks": {task: loss}, "mean", "worst"}; a loss is positive when the task got worse.

        first-last: R[j, j] against the last row; max-last: the best of all rows against the last row. In units of each
        task's metric, over the tasks that another task followed; mean and worst are 0 when there is none.
        """
        if definition not in _DEFINITIONS:
            raise ValueError(f"definition must be one of {', '.join(_DEFINITIONS)}, got {definition!r}")
        losses = {}
        for j, task in enumerate(self.tasks[: max(len(self.rows) - 1, 0)]):
            sign = 1 if higher_is_better(self.metric[task]) else -1
            column = [sign * self.value(i, j) for i in range(j, len(self.rows))]
            losses[task] = (column[0] if definition == "first-last" else max(column)) - column[-1]
        mean = math.fsum(losses.values()) / len(losses) if losses else 0.0
        worst = max(losses.values(), default=0.0)
        return {"definition": _DEFINITIONS[definition], "tasks": losses, "mean": mean, "worst": worst}

    def backward_transfer(self) -> float:
        """Mean of R[last, j] - R[j, j] over the tasks that another one followed, positive when they got better."""
        return 0.0 - self.forgetting("first-last")["mean"]

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back without loss."""
        return {"tasks": list(self.tasks), "metric": dict(self.metric), "rows": deepcopy(self.rows)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ResultMatrix:
        """ValueError when `values` is not what `to_json` writes."""
        if not isinstance(values, Mapping) or set(values) != {"tasks", "metric", "rows"}:
            got = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"a result matrix must have the keys tasks, metric and rows, got {got}")
        matrix = cls(values["tasks"], values["metric"])
        for row in values["rows"]:
            matrix.append(row)
        return matrix

    def to_text(self) -> str:
        """A plain text table: a row after each task, a column for each task in its own metric."""
        head = ["after", *(f"{task} {self.metric[task]}" for task in self.tasks)]
        table = [head]
        for i, row in enumerate(self.rows):
            cells = [f"{row[task][self.metric[task]]:.4f}" if task in row else "" for task in self.tasks]
            table.append([self.tasks[i], *cells])
        widths = [max(len(line[c]) for line in table) for c in range(len(head))]
        lines = []
        for first, *cells in table:
            right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *right]))
        return "\n".join(lines)

    def _position(self, task: int | str, what: str) -> int:
        if isinstance(task, str):
            if task not in self.metric:
                raise ValueError(f"{what} must be one of {', '.join(self.tasks)}, got {task!r}")
            return self.tasks.index(task)
        position = task + len(self.tasks) if task < 0 else task
        if not 0 <= position < len(self.tasks):
            places = f"in 0..{len(self.tasks) - 1}" if self.tasks else "of a task, and there is none yet"
            raise IndexError(f"{what} must be {places}, got {task}")
        return position
