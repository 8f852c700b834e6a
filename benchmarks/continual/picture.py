"""The comparison in one picture: what PCL gains over each method, and what each forgets; and studies in another."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.continual import records
from benchmarks.continual.methods import CONTINUAL, MULTI_TASK
from benchmarks.continual.summary import Summary, decimals, summarise
from pcl_ext.report.charts import CHEAP, MUTED, OURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROWING = {"cold": "newest events known of a test user", "backbone": "width D", "data": "share of the labels"}
WIDEST = 25.0  # %, of a gain that is drawn; of a greater one there is its number


def overview(summary: Summary, ours: str = "pcl") -> Figure | None:
    """`ours` over each method, mean relative gain with a standard error either way, the hardest to beat first; and the
    mean forgetting of both. None where there is nothing to compare."""
    gains = {name: gain["mean"] for name, gain in summary.over(ours).items()}
    if not gains:
        return None
    names = sorted(gains, key=lambda name: gains[name].mean)
    figure = new_figure(8.5, 1.2 + 0.24 * len(names))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    lost = [summary.rows[name].lost() for name in names]
    for place, name in enumerate(names):
        colour = _colour(name)
        gain, error = 100 * gains[name].mean, 100 * np.nan_to_num(gains[name].error)
        if gain <= WIDEST:
            left.errorbar(gain, place, xerr=error, fmt="D", ms=4, lw=1.5, color=colour)
        left.annotate(f"{gain:+.1f} %", (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", size=7)
        right.barh(place, lost[place], height=0.55, color=colour)
        text = decimals(lost[place]) if lost[place] else "0"
        right.annotate(text, (max(0.0, lost[place]), place), (3, 0), textcoords="offset points", va="center", size=7)
    left.axvline(0, color=MUTED, lw=1)
    left.set_xlabel(f"mean relative gain of {ours} over it, % (line: one standard error)", size=8)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_yticks(range(len(names)), names)
    left.margins(x=0.2)
    right.set_xlabel(f"mean forgetting ({ours}: {summary.rows[ours].lost():.4g})", size=8)
    right.set_xlim(None, 1.3 * max(*lost, 1e-3))
    right.locator_params("x", nbins=4)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    kinds = {"continual learning": OURS, "multi-task": CHEAP, "others": MUTED}
    handles = [left.plot([], [], "D", ms=4, color=colour, label=kind)[0] for kind, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def _colour(name: str) -> str:
    return OURS if name in CONTINUAL else CHEAP if name in MULTI_TASK else MUTED


def growth(lines: list[dict[str, Any]], ours: str = "pcl") -> Figure | None:
    """Studies of something that grows, a panel each: `ours` over each method, mean relative gain with a standard error
    either way. None where no line is of such a study with `ours`."""
    panels = {study: [line for line in lines if line["study"] == study] for study in GROWING}
    panels = {study: own for study, own in panels.items() if any(line["method"] == ours for line in own)}
    if not panels:
        return None
    figure = new_figure(1.5 + 4 * len(panels), 3.6)
    for axes, (study, own) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _growth_panel(axes, own, ours)
        axes.set_xlabel(GROWING[study])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"mean relative gain of {ours} over it, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _growth_panel(axes: Axes, lines: list[dict[str, Any]], ours: str) -> None:
    """A variant is called METHOD-SIZE, or METHOD where all is there."""
    values: dict = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        size = line["variant"].removeprefix(line["method"]).removeprefix("-")
        values[line["method"], size][line["fold"], line["seed"]][line["task"]] = line["value"]
    summary = Summary({}, values, {}, {line["task"]: line["metric"] for line in lines}, {}, {})
    sizes = sorted((size for method, size in values if method == ours), key=lambda size: float(size or "inf"))
    for other in dict.fromkeys(method for method, _ in values if method != ours):
        found = {place: summary.paired((ours, size), (other, size)) for place, size in enumerate(sizes)}
        gains = {place: gain["mean"] for place, gain in found.items() if gain}
        means, errors = ([100 * getattr(gain, part) for gain in gains.values()] for part in ("mean", "error"))
        axes.errorbar(list(gains), means, np.nan_to_num(errors), marker="o", ms=3, lw=1.2, label=other)
    axes.axhline(0, color=MUTED, lw=1)
    axes.set_xticks(range(len(sizes)), [size or "all" for size in sizes])


def write_picture(out: Path) -> Path | None:
    """overview.svg in the folder of a comparison; -> its path, None where there is nothing to compare."""
    return _save(overview(summarise(out)), out / "overview.svg")


def write_growth(out: Path) -> Path | None:
    """studies.svg in the folder of studies; -> its path, None where there is nothing to draw."""
    return _save(growth(records.read_lines(out / "studies.jsonl")), out / "studies.svg")


def _save(figure: Figure | None, path: Path) -> Path | None:
    """The same bytes for the same figure."""
    import matplotlib

    if figure is None:
        return None
    with matplotlib.rc_context({"svg.hashsalt": "pcl_ext"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path
