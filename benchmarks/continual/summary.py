"""What the page shows, from the files of a comparison: means, deviations, matrices, and who is the best of its kind."""

from __future__ import annotations

import math
import re
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

    def lost(self) -> float:
        """Mean forgetting of all tasks but the last, which nothing came after."""
        return float(np.mean(list(self.forgetting.values())[:-1] or [0.0]))


@dataclass(frozen=True)
class Gain:
    """Mean over folds of a relative gain, and its standard error (NaN for one fold)."""

    mean: float
    error: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {100 * self.error:.1f}"
        return f"{100 * self.mean:+.1f}{error} %"


@dataclass(frozen=True)
class Summary:
    """What a comparison found.

    rows      by method
    values    {method: {(fold, seed): {task: value}}}
    matrix    {method: (after, [rows, tasks] with NaN where there is nothing)}, of the methods that have one
    metric    by task
    protocol  of the first line
    keys      {method: {(fold, seed): the trial whose outputs are measured}}
    """

    rows: dict[str, Row]
    values: dict[str, dict[Key, dict[str, float]]]
    matrix: dict[str, tuple[list[str], np.ndarray]]
    metric: dict[str, str]
    protocol: dict[str, Any]
    keys: dict[str, dict[Key, str]]

    def gain(self, method: str, base: str) -> float:
        """Mean over tasks of the relative gain over another method, on the folds and seeds that both have; NaN without
        any."""
        gains = self.paired(method, base)
        return gains["mean"].mean if gains else float("nan")

    def strongest(self, methods: tuple[str, ...], ours: str) -> str | None:
        """The one of these over which `ours` gains least, a mean over tasks."""
        gains = {name: self.gain(ours, name) for name in methods if name in self.rows and ours in self.rows}
        known = {name: gain for name, gain in gains.items() if math.isfinite(gain)}
        return min(known, key=known.get, default=None)

    def paired(self, ours: str, other: str) -> dict[str, Gain]:
        """Gains of a method over another by task, and of their "mean", on the folds and seeds that both have.

        A fold's value is the mean over its seeds. Empty where they have nothing in common.
        """
        shared = self.values[ours].keys() & self.values[other].keys()
        folds = sorted({fold for fold, _ in shared})
        if not folds:
            return {}
        gains = {}
        for task, name in self.metric.items():
            means = [
                [np.mean([self.values[method][key][task] for key in shared if key[0] == fold]) for fold in folds]
                for method in (ours, other)
            ]
            with np.errstate(invalid="ignore", divide="ignore"):  # over nothing there is no relative gain
                ratio = np.divide(*means) - 1.0
            gains[task] = ratio if higher_is_better(name) else -ratio
        gains["mean"] = np.mean(list(gains.values()), axis=0)
        return {task: Gain(float(gain.mean()), _error(gain)) for task, gain in gains.items()}

    def over(self, ours: str) -> dict[str, dict[str, Gain]]:
        """`paired` with each other method with which there is something in common; empty without `ours`."""
        others = [name for name in self.rows if name != ours and ours in self.rows]
        return {name: gains for name in others if (gains := self.paired(ours, name))}

    def hindsight(self, ours: str, methods: tuple[str, ...]) -> Gain | None:
        """What picking by the test users gains over `ours`: for each task, fold and seed the best of it and of these
        methods; a mean over tasks. No method can be chosen so: it says what any choice among them can gain at most. On
        the folds and seeds that all have; None where there are none."""
        shared = set.intersection(*(set(self.values[name]) for name in (ours, *methods)))
        folds: dict[str, list[float]] = defaultdict(list)
        for key in shared:
            for task, metric in self.metric.items():
                values = np.array([self.values[name][key][task] for name in (ours, *methods)])
                with np.errstate(invalid="ignore", divide="ignore"):
                    ratios = values / values[0] - 1.0
                folds[key[0]].append(ratios.max() if higher_is_better(metric) else -ratios.min())
        means = np.array([np.mean(gains) for gains in folds.values()])
        return Gain(float(means.mean()), _error(means)) if folds else None


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
    values: dict[str, dict[Key, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        values[line["method"]][line["fold"], line["seed"]][line["task"]] = line["value"]
    entries = {name: [entry for entry in matrices if entry["method"] == name] for name in rows}
    matrix = {name: _matrix(own, list(metric)) for name, own in entries.items() if own}
    return Summary(rows, values, matrix, metric, lines[0]["protocol"], keys)


def decimals(value: float) -> str:
    """Four places, without the 0 before the point: .1234, -.0500, 10.1234; no -.0000."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(value, 4) + 0.0:.4f}")


def _row(method: str, tasks: dict[str, list[dict]]) -> Row:
    def each(field: str, how) -> dict[str, float]:
        return {task: float(how([line[field] for line in lines])) for task, lines in tasks.items()}

    later = {task: lines for task, lines in tasks.items() if task != "next"} or tasks
    runs = len(next(iter(tasks.values())))
    deviation = each("value", lambda v: np.std(v, ddof=1) if len(v) > 1 else np.nan)
    means = [np.mean([[line[f] for line in lines] for lines in later.values()]) for f in ("parameters", "seconds")]
    return Row(method, runs, each("value", np.mean), deviation, each("forgetting", np.mean), *map(float, means))


def _error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan


def _matrix(entries: list[dict], tasks: list[str]) -> tuple[list[str], np.ndarray]:
    after = [row["after"] for row in entries[0]["test"]]
    values = [[[row["values"].get(t, np.nan) for t in tasks] for row in entry["test"]] for entry in entries]
    return after, np.mean(values, axis=0)


def contests(summary: Summary, out: Path, ours: str = "pcl") -> dict[str, tuple[str, dict[str, Interval]]]:
    """{what: (method, intervals)} of `ours` against the strongest of each kind, on the folds and seeds that both have
    and whose test outputs are in `out`; a kind without such runs is left out."""
    kinds = {
        "best continual-learning baseline": summary.strongest(CONTINUAL, ours),
        "best multi-task baseline": summary.strongest(MULTI_TASK, ours),
        "linear probe": summary.strongest(("probe",), ours),
        "pooled linear probe": summary.strongest(("pooled-probe",), ours),
        "Eq. (1) alone": summary.strongest(("pcl-eq1",), ours),
        "the same memory without backbone": summary.strongest(("pcl-no-backbone",), ours),
        "a fine-tuned copy per task": summary.strongest(("copy",), ours),
    }
    return {
        what: (other, intervals)
        for what, other in kinds.items()
        if other not in (None, ours) and (intervals := against(summary, out, ours, other))
    }


def against(summary: Summary, out: Path, ours: str, other: str) -> dict[str, Interval]:
    """Intervals of `ours` over another method; empty where `out` has no outputs of both."""
    shared = sorted(summary.keys[ours].keys() & summary.keys[other].keys())
    pairs = [(key, [summary.keys[name][key] for name in (ours, other)]) for key in shared]
    pairs = [(key, trials) for key, trials in pairs if all(records.has_outputs(out, trial) for trial in trials)]
    if not pairs:
        return {}
    first, second = ({key: records.load_outputs(out, trials[i]) for key, trials in pairs} for i in range(2))
    return compare(first, second, summary.metric)
