"""The comparison's tables in Markdown: table.md beside the page, to be read in a terminal or put into a document."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.continual.summary import Gain, Summary, decimals, summarise


def write_table(out: Path, ours: str = "pcl") -> Path:
    """table.md in the folder of a comparison: results by method, ours' relative gain over each by task, what picking
    with hindsight would gain; -> its path. ValueError where there are no results."""
    summary = summarise(out)
    heads = ["method", "folds x seeds", *summary.metric, "mean", f"{ours} over it, mean", "forgetting"]
    heads += ["parameters a task", "seconds a task"]
    results = [["", "", *summary.metric.values(), *[""] * 5], *(_line(summary, name, ours) for name in summary.rows)]
    others = [name for name in summary.rows if name != ours and ours in summary.rows]
    gains = [[name, *map(_gain, gain.values())] for name in others if (gain := summary.paired(ours, name))]
    tables = [_table(heads, results)] + ([_table([f"{ours} over", *summary.metric, "mean"], gains)] if gains else [])
    picked = summary.hindsight(ours, tuple(others)) if others else None
    if picked is not None:
        tables.append(f"The best of all for each task, picked by the test users: {_gain(picked)} over {ours}.\n")
    path = out / "table.md"
    path.write_text("\n".join(tables), "utf-8")
    return path


def _table(heads: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, ["---"] * len(heads), *lines])


def _line(summary: Summary, name: str, ours: str) -> list[str]:
    row, gains = summary.rows[name], {}
    if ours in summary.rows and name != ours:
        gains = summary.paired(ours, name)
    return [
        name,
        _runs(list(summary.values[name])),
        *(_number(row.value[task], row.deviation[task]) for task in summary.metric),
        decimals(row.mean()),
        _gain(gains["mean"]) if gains else "",
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


def _gain(gain: Gain) -> str:
    error = "" if np.isnan(gain.error) else f" ± {100 * gain.error:.1f}"
    return f"{100 * gain.mean:+.1f}{error} %"
