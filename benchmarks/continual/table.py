"""The comparison's tables: texts, and in Markdown table.md, to be read in a terminal or put into a document."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.continual.summary import Summary, decimals, summarise


def write_table(out: Path, ours: str = "pcl") -> Path:
    """table.md in the folder of a comparison: results by method, ours' relative gain over each by task, what picking
    with hindsight would gain; -> its path. ValueError where there are no results."""
    summary = summarise(out)
    head, *lines = results(summary, ours)
    tables, gains = [_table(head, lines)], summary.over(ours)
    if gains:
        lines = [[name, *map(str, gain.values())] for name, gain in gains.items()]
        tables.append(_table([f"{ours} over", *summary.metric, "mean"], lines))
    others = tuple(name for name in summary.rows if name != ours and ours in summary.rows)
    if others and (picked := summary.hindsight(ours, others)) is not None:
        tables.append(f"The best of all for each task, picked by the test users: {picked} over {ours}.\n")
    path = out / "table.md"
    path.write_text("\n".join(tables), "utf-8")
    return path


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def results(summary: Summary, ours: str) -> list[list[str]]:
    """A line of heads, one of the tasks' metrics below them, and one of each method."""
    head = ["method", "folds x seeds", *summary.metric, "mean", f"{ours} over it, mean", "forgetting"]
    head += ["parameters a task", "seconds a task"]
    gains = {name: str(gain["mean"]) for name, gain in summary.over(ours).items()}
    lines = [_line(summary, name, gains.get(name, "")) for name in summary.rows]
    return [head, ["", "", *summary.metric.values(), *[""] * 5], *lines]


def _line(summary: Summary, name: str, gain: str) -> list[str]:
    row = summary.rows[name]
    return [
        name,
        _runs(list(summary.values[name])),
        *(_number(row.value[task], row.deviation[task]) for task in summary.metric),
        decimals(row.mean()),
        gain,
        decimals(row.lost()) if row.lost() else "0",
        f"{row.parameters:,.0f}",
        f"{row.seconds:.1f}",
    ]


def _runs(keys: list[tuple[str, int]]) -> str:
    """Folds x seeds; how many runs, where not every fold has the same number of seeds."""
    folds, seeds = ({key[place] for key in keys} for place in range(2))
    return f"{len(folds)} x {len(seeds)}" if len(folds) * len(seeds) == len(keys) else f"{len(keys)} runs"


def _number(value: float, deviation: float) -> str:
    return decimals(value) if np.isnan(deviation) else f"{decimals(value)} ± {decimals(deviation)}"
