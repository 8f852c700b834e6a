"""The comparison in one picture: what PCL gains over each method, and what each forgets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.continual.methods import CONTINUAL, MULTI_TASK
from benchmarks.continual.summary import Summary, decimals, summarise
from pcl_ext.report.charts import CHEAP, MUTED, OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 25.0  # %, of a gain that is drawn; of a greater one there is its number


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def overview(summary: Summary, ours: str = "pcl") -> Figure | None:
    """`ours` over each method, mean relative gain with a standard error either way, the hardest to beat first; and the
    mean forgetting of both. None where there is nothing to compare."""
    others = [name for name in summary.rows if name != ours] if ours in summary.rows else []
    gains = {name: gain["mean"] for name in others if (gain := summary.paired(ours, name))}
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
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    kinds = {"continual learning": OURS, "multi-task": CHEAP, "others": MUTED}
    handles = [left.plot([], [], "D", ms=4, color=colour, label=kind)[0] for kind, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def _colour(name: str) -> str:
    return OURS if name in CONTINUAL else CHEAP if name in MULTI_TASK else MUTED


def write_picture(out: Path) -> Path | None:
    """overview.svg in the folder of a comparison, the same bytes for the same results; -> its path, None where there is
    nothing to compare."""
    import matplotlib

    figure = overview(summarise(out))
    if figure is None:
        return None
    with matplotlib.rc_context({"svg.hashsalt": "pcl_ext"}):
        figure.savefig(out / "overview.svg", metadata={"Date": None, "Creator": None})
    return out / "overview.svg"
