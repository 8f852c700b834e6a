"""What the page shows, from the files of a comparison: means, deviations, matrices, and who is the best of its kind."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual import records
from benchmarks.continual.intervals import Interval, compare
from benchmarks.continual.methods import CONTINUAL, MULTI_TASK, NAMES
from pcl_ext.metrics import higher_is_better

Key = tuple[str, int]  # fold, seed


@dataclass(frozen=True)
class Row:
    """One method over all folds and seeds: by task, mean and standard deviation of the value, and mean forgetting."""

    method: str
    runs: int
    value: dict[str, float]
    deviation: dict[str, float]
    forgetting: dict[str, float]
    parameters: float
    seconds: float

    def mean(self) -> float:
        """Mean over the tasks of the metric as it is."""
        return float(np.mean(list(self.value.values())))


@dataclass(frozen=True)
class Summary:
    """rows by method; matrix {method: (after, [rows, tasks] with NaN where there is nothing)}; metric by task."""

    rows: dict[str, Row]
    matrix: dict[str, tuple[list[str], np.ndarray]]
    metric: dict[str, str]
    protocol: dict[str, Any]
    keys: dict[str, dict[Key, str]]  # of each method, the trial whose outputs are measured

    def gain(self, method: str, base: str) -> float:
        """Mean over tasks of the relative gain over another method."""
        gains = []
        for task, name in self.metric.items():
            ratio = self.rows[method].value[task] / self.rows[base].value[task] - 1.0
            gains.append(ratio if higher_is_better(name) else -ratio)
        return float(np.mean(gains))

    def best(self, methods: tuple[str, ...]) -> str | None:
        """The one of these with the best result: the mean relative gain over the first of them."""
        present = [name for name in methods if name in self.rows]
        return max(present, key=lambda name: self.gain(name, present[0]), default=None)


def summarise(out: Path) -> Summary:
    lines, matrices = records.read_lines(out / "results.jsonl"), records.read_lines(out / "matrices.jsonl")
    if not lines:
        raise ValueError(f"{out} has no results yet: results.jsonl is missing or empty")
    grouped: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        grouped[line["method"]][line["task"]].append(line)
    rows = {name: _row(name, grouped[name]) for name in (*NAMES, *sorted(set(grouped) - set(NAMES))) if name in grouped}
    metric = {line["task"]: line["metric"] for line in lines}
    keys: dict[str, dict[Key, str]] = defaultdict(dict)
    for entry in matrices:
        keys[entry["method"]][entry["fold"], entry["seed"]] = "{method}/{fold}-{seed}-{point}".format(**entry)
    matrix = {name: _matrix([m for m in matrices if m["method"] == name], list(metric)) for name in rows}
    return Summary(rows, matrix, metric, lines[0]["protocol"], keys)


def _row(method: str, tasks: dict[str, list[dict]]) -> Row:
    def each(field: str, how) -> dict[str, float]:
        return {task: float(how([line[field] for line in lines])) for task, lines in tasks.items()}

    later = {task: lines for task, lines in tasks.items() if task != "next"} or tasks
    runs = len(next(iter(tasks.values())))
    deviation = each("value", lambda v: np.std(v, ddof=1) if len(v) > 1 else np.nan)
    means = [np.mean([[line[f] for line in lines] for lines in later.values()]) for f in ("parameters", "seconds")]
    return Row(method, runs, each("value", np.mean), deviation, each("forgetting", np.mean), *map(float, means))


def _matrix(entries: list[dict], tasks: list[str]) -> tuple[list[str], np.ndarray]:
    after = [row["after"] for row in entries[0]["test"]]
    values = [[[row["values"].get(t, np.nan) for t in tasks] for row in entry["test"]] for entry in entries]
    return after, np.mean(values, axis=0)


def contests(summary: Summary, out: Path, ours: str = "pcl") -> dict[str, tuple[str, dict[str, Interval]]]:
    """{what: (method, intervals)} of `ours` against the best of each kind, on the folds and seeds that both have."""
    kinds = {
        "best continual-learning baseline": summary.best(CONTINUAL),
        "best multi-task baseline": summary.best(MULTI_TASK),
        "linear probe": summary.best(("probe",)),
        "pooled linear probe": summary.best(("pooled-probe",)),
        "Eq. (1) alone": summary.best(("pcl-eq1",)),
        "the same memory without backbone": summary.best(("pcl-no-backbone",)),
        "a fine-tuned copy per task": summary.best(("copy",)),
    }
    return {
        what: (other, against(summary, out, ours, other))
        for what, other in kinds.items()
        if other is not None and ours in summary.rows and other != ours
    }


def against(summary: Summary, out: Path, ours: str, other: str) -> dict[str, Interval]:
    shared = summary.keys[ours].keys() & summary.keys[other].keys()
    first, second = (
        {key: records.load_outputs(out, summary.keys[name][key]) for key in sorted(shared)} for name in (ours, other)
    )
    return compare(first, second, summary.metric)
