"""The report's page: one HTML file that holds its pictures and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.continual.methods import CONTINUAL
from benchmarks.continual.picture import WIDEST, overview
from benchmarks.continual.summary import Summary, contests, decimals, summarise
from benchmarks.continual.table import results
from pcl_ext.metrics import higher_is_better
from pcl_ext.report.charts import CHEAP, MUTED, OURS, new_figure, png
from pcl_ext.report.parts import details, document, image, note, numbers, pairs, section, table

_WIDE = "body { max-width: 84rem; } table { font-size: .82rem; } th, td { padding-right: .6rem; }"


def write_page(out: Path) -> Path:
    """report.html in the folder of a comparison; -> its path. ValueError where there are no results."""
    summary = summarise(out)
    found = contests(summary, out)
    parts = [
        note(_runs(summary)),
        section("At a glance", note(_LEAD), _overview(summary)),
        section("Results", note(_TABLE), _results(summary)),
        section("PCL against each method", note(_PAIRED), _gains(summary)),
        section("PCL against the best of each kind", note(_BOOTSTRAP), _intervals(summary, found), _forest(found)),
        section("Forgetting", note(_CURVES), _curves(summary)),
        section("Result matrices", note(_MATRIX), *(_matrix(summary, name) for name in summary.matrix)),
        section("Protocol", _protocol(summary)),
    ]
    page = out / "report.html"
    page.write_text(document("PCL against multi-task and continual-learning baselines", parts, _WIDE), "utf-8")
    return page


_LEAD = (
    "One backbone is pretrained, then every method learns the same tasks from it: one after another, or, multi-task "
    "methods, all at once. Left: how much better PCL is than each method, the mean over tasks; at 0 they are equal. "
    "The hardest to beat comes first. Right: how much of earlier tasks each has lost in the end."
)
_TABLE = (
    "Mean over folds and seeds ± standard deviation of the runs, in each task's own metric, after the last task. "
    "Mean: of the metrics as they are. Pcl over it: the mean over tasks of PCL's relative gain. "
    "Forgetting: mean over earlier tasks of R[j, j] - R[K, j]. Parameters: numbers of 32 bits per later task."
)
_PAIRED = (
    "Relative gain of pcl, mean over folds ± one standard error of that mean, paired by fold; a fold's value is the "
    "mean over its seeds. A gain inside one standard error is a tie."
)
_BOOTSTRAP = (
    "Relative gain with a paired bootstrap interval of 95 % over test users. The best of a kind is the one over "
    "which pcl gains least on the test users. An interval that holds 0 is a tie. Runs whose test outputs are not in "
    "this folder are left out."
)
_CURVES = (
    "Share of R[j, j] that is left, mean over earlier tasks, after each task was learned. PCL is 1 by construction; "
    "others that have lost nothing in the end are left out."
)
_MATRIX = (
    "R[i, j]: task j after task i was learned, mean over folds and seeds. Methods that learn all at once have one row."
)


def _runs(summary: Summary) -> str:
    runs = [row.runs for row in summary.rows.values()]
    text = f"{len(summary.rows)} methods, {len(summary.metric)} tasks; runs of each, folds x seeds: {max(runs)}."
    short = [f"{name} ({row.runs})" for name, row in summary.rows.items() if row.runs < max(runs)]
    return text + (f" Not complete yet: {', '.join(short)}." if short else "")


def _overview(summary: Summary) -> str:
    figure = overview(summary)
    return "" if figure is None else image(png(figure), "PCL's gain over each method, and what each forgets")


def _results(summary: Summary) -> str:
    names, metrics, *lines = results(summary, "pcl")
    head = [f"{name}\n{metric}" for name, metric in zip(names, metrics, strict=True)]
    first, *others = ([line[0], *numbers(line[1:])] for line in (head, *lines))
    return table(first, others)


def _gains(summary: Summary) -> str:
    tasks = [*summary.metric, "mean"]
    rows = [
        [name, *((str(g), _tone(g.mean - g.error, g.mean + g.error)) for g in gains.values())]
        for name, gains in summary.over("pcl").items()
    ]
    return table(["against", *numbers(tasks)], rows) if rows else ""


def _tone(low: float, high: float) -> str:
    return "n up" if low > 0 else "n down" if high < 0 else "n tie"


def _intervals(summary: Summary, found: dict) -> str:
    tasks = [*summary.metric, "mean"]
    rows = [
        [f"{what}: {other}", *((str(part[task]), _tone(part[task].low, part[task].high)) for task in tasks)]
        for what, (other, part) in found.items()
    ]
    return table(["against", *numbers(tasks)], rows) if rows else ""


def _forest(found: dict) -> str:
    """The mean gain over each opponent with its interval."""
    shown = {f"{what}: {other}": parts["mean"] for what, (other, parts) in found.items()}
    shown = {name: part for name, part in shown.items() if 100 * part.gain <= WIDEST}
    if not shown:
        return ""
    figure = new_figure(8.5, 0.8 + 0.4 * len(shown))
    axes = figure.add_subplot()
    for place, part in enumerate(shown.values()):
        axes.plot([100 * part.low, 100 * part.high], [place, place], color=OURS, lw=2)
        axes.plot(100 * part.gain, place, "D", color=OURS)
    axes.axvline(0, color=MUTED, lw=1)
    axes.axvline(2.1, color=CHEAP, lw=1, ls=":")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set_xlabel(f"mean relative gain of pcl, %, up to {WIDEST:.0f} (dotted: 2.1, the gain aimed at)")
    axes.spines[["top", "right"]].set_visible(False)
    return image(png(figure), "Mean relative gain with its interval, against each opponent")


def _curves(summary: Summary) -> str:
    """What is left of the earlier tasks, after each task."""
    figure = new_figure(8.5, 4)
    axes = figure.add_subplot()
    forgetful = [name for name in CONTINUAL if name in summary.rows and summary.rows[name].lost()]
    for name in (*forgetful, "pcl"):
        if name not in summary.matrix or len(summary.matrix[name][0]) < 2:
            continue
        after, values = summary.matrix[name]
        own, up = np.diag(values[:, : len(after)]), [1 if higher_is_better(m) else -1 for m in summary.metric.values()]
        left = [float(np.mean((values[i, :i] / own[:i]) ** up[:i])) for i in range(1, len(after))]
        mine = name == "pcl"
        axes.plot(range(1, len(after)), left, marker="o", ms=3, lw=2.5 if mine else 1.2, label=name)
    if not axes.lines:
        return ""
    axes.set_xticks(range(1, len(after := _longest(summary))), after[1:])
    axes.set_ylabel("share of R[j, j] left")
    axes.set_xlabel("after learning")
    axes.legend(frameon=False, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return image(png(figure), "Share of the first result left after each task")


def _longest(summary: Summary) -> list[str]:
    return max((after for after, _ in summary.matrix.values()), key=len)


def _matrix(summary: Summary, name: str) -> str:
    after, values = summary.matrix[name]
    rows = [
        [label, *numbers("" if np.isnan(value) else decimals(value) for value in row)]
        for label, row in zip(after, values, strict=True)
    ]
    return details(name, table(["after", *numbers(summary.metric)], rows))


def _protocol(summary: Summary) -> str:
    rows = [(key, str(value)) for key, value in summary.protocol.items() if key not in ("setting", "dataset")]
    return pairs(rows) + note("The dataset's hash and the chosen setting are in each result line.")
