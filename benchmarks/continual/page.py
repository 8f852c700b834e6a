"""The report's page: one HTML file that holds its pictures and asks the network for nothing."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np

from benchmarks.continual.methods import CONTINUAL
from benchmarks.continual.picture import new_figure, overview
from benchmarks.continual.summary import Gain, Summary, contests, summarise
from pcl_ext.metrics import higher_is_better
from pcl_ext.report.charts import CHEAP, DPI, MUTED, OURS
from pcl_ext.report.page import CSS, POLICY

WIDE = "body { max-width: 84rem; } table { font-size: .82rem; } th, td { padding-right: .6rem; }"


def write_page(out: Path) -> Path:
    """report.html in the folder of a comparison; -> its path. ValueError where there are no results."""
    summary = summarise(out)
    found = contests(summary, out)
    parts = [
        "<h1>PCL against multi-task and continual-learning baselines</h1>",
        f'<p class="quiet">{_safe(_runs(summary))}</p>',
        _section("Results", _note(_TABLE) + _table(summary)),
        _section("PCL against each method", _note(_PAIRED) + _overview(summary) + _gains(summary)),
        _section("PCL against the best of each kind", _note(_BOOTSTRAP) + _intervals(summary, found) + _forest(found)),
        _section("Forgetting", _note(_CURVES) + _curves(summary)),
        _section("Result matrices", _note(_MATRIX) + "".join(_matrix(summary, name) for name in summary.matrix)),
        _section("Protocol", _protocol(summary)),
    ]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>PCL against baselines</title><style>{CSS}{WIDE}</style>"
    page = out / "report.html"
    body = "\n".join(parts)
    page.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n', "utf-8")
    return page


_TABLE = (
    "Mean over folds and seeds ± standard deviation of the runs, in each task's own metric, after the last task. "
    "Mean: of the metrics as they are. Gain: mean over tasks of the relative gain over the method named. "
    "Forgetting: mean over earlier tasks of R[j, j] - R[K, j]. Parameters: numbers of 32 bits per later task."
)
_PAIRED = (
    "Relative gain of pcl, mean over folds ± one standard error of that mean, paired by fold; a fold's value is the "
    "mean over its seeds. A gain inside one standard error is a tie."
)
_BOOTSTRAP = (
    "Relative gain with a paired bootstrap interval of 95 % over test users. The best of a kind is the one with the "
    "best mean on the test users. An interval that holds 0 is a tie. Runs whose test outputs are not in this "
    "folder are left out."
)
_CURVES = (
    "Share of R[j, j] that is left, mean over earlier tasks, after each task was learned. PCL is 1 by construction."
)
_MATRIX = (
    "R[i, j]: task j after task i was learned, mean over folds and seeds. Methods that learn all at once have one row."
)


def _safe(text: object) -> str:
    return html.escape(str(text))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_safe(title)}</h2>{content}</section>"


def _note(text: str) -> str:
    return f'<p class="quiet">{_safe(text)}</p>'


def _runs(summary: Summary) -> str:
    runs = [row.runs for row in summary.rows.values()]
    text = f"{len(summary.rows)} methods, {len(summary.metric)} tasks, {max(runs)} runs (folds x seeds) of each."
    short = [f"{name} ({row.runs})" for name, row in summary.rows.items() if row.runs < max(runs)]
    return text + (f" Not complete yet: {', '.join(short)}." if short else "")


def _table(summary: Summary) -> str:
    base = "probe" if "probe" in summary.rows else next(iter(summary.rows))
    heads = [f"{task}<br>{metric}" for task, metric in summary.metric.items()]
    heads += ["mean", f"gain over {base}", "forgetting", "parameters a task", "seconds a task"]
    lines = ["<tr><th>method</th>" + "".join(f"<th class=n>{head}</th>" for head in heads) + "</tr>"]
    for name, row in summary.rows.items():
        cells = [_value(row.value[task], row.deviation[task]) for task in summary.metric]
        lost = row.lost()
        cells += [f"{row.mean():.4f}", f"{summary.gain(name, base):+.1%}", f"{lost:+.4f}" if lost else "0"]
        cells += [f"{row.parameters:,.0f}", f"{row.seconds:.1f}"]
        lines.append(f"<tr><td>{_safe(name)}</td>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _value(value: float, deviation: float) -> str:
    return f"{value:.4f}" + ("" if np.isnan(deviation) else f" ± {deviation:.4f}")


def _gains(summary: Summary, ours: str = "pcl") -> str:
    if ours not in summary.rows:
        return ""
    lines = ["<tr><th>against</th>" + "".join(f"<th class=n>{_safe(task)}</th>" for task in [*summary.metric, "mean"])]
    for other in summary.rows:
        if other == ours or not (gains := summary.paired(ours, other)):
            continue
        cells = [f'<td class="n {_tone(g.mean - g.error, g.mean + g.error)}">{_gain(g)}</td>' for g in gains.values()]
        lines.append(f"<tr><td>{_safe(other)}</td>{''.join(cells)}")
    return f"<table>{'</tr>'.join(lines)}</tr></table>"


def _gain(gain: Gain) -> str:
    return f"{gain.mean:+.1%}" + ("" if np.isnan(gain.error) else f" ± {gain.error:.1%}")


def _tone(low: float, high: float) -> str:
    return "up" if low > 0 else "down" if high < 0 else "tie"


def _intervals(summary: Summary, found: dict) -> str:
    tasks = [*summary.metric, "mean"]
    head = "<tr><th>against</th>" + "".join(f"<th class=n>{_safe(task)}</th>" for task in tasks) + "</tr>"
    lines = [head]
    for what, (other, intervals) in found.items():
        cells = []
        for task in tasks:
            part = intervals[task]
            text = f"{part.gain:+.1%}<br>{part.low:+.1%} .. {part.high:+.1%}"
            cells.append(f'<td class="n {_tone(part.low, part.high)}">{text}</td>')
        lines.append(f"<tr><td>{_safe(what)}: {_safe(other)}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _picture(figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_safe(text)}" src="data:image/png;base64,{data}">'


def _overview(summary: Summary) -> str:
    figure = overview(summary)
    return "" if figure is None else _picture(figure, "PCL's gain over each method, and what each forgets")


def _forest(found: dict) -> str:
    """The mean gain over each opponent with its interval."""
    if not found:
        return ""
    figure = new_figure(8.5, 0.8 + 0.4 * len(found))
    axes = figure.add_subplot()
    for place, (_, intervals) in enumerate(found.values()):
        part = intervals["mean"]
        axes.plot([100 * part.low, 100 * part.high], [place, place], color=OURS, lw=2)
        axes.plot(100 * part.gain, place, "D", color=OURS)
    axes.axvline(0, color=MUTED, lw=1)
    axes.axvline(2.1, color=CHEAP, lw=1, ls=":")
    axes.set_yticks(range(len(found)), [f"{what}: {other}" for what, (other, _) in found.items()])
    axes.invert_yaxis()
    axes.set_xlabel("mean relative gain of pcl, % (dotted: 2.1 %)")
    axes.spines[["top", "right"]].set_visible(False)
    return _picture(figure, "Mean relative gain with its interval, against each opponent")


def _curves(summary: Summary) -> str:
    """What is left of the earlier tasks, after each task."""
    figure = new_figure(8.5, 4)
    axes = figure.add_subplot()
    for name in (*CONTINUAL, "pcl-eq1", "pcl"):
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
    return _picture(figure, "Share of the first result left after each task")


def _longest(summary: Summary) -> list[str]:
    return max((after for after, _ in summary.matrix.values()), key=len)


def _matrix(summary: Summary, name: str) -> str:
    after, values = summary.matrix[name]
    lines = ["<tr><th>after</th>" + "".join(f"<th class=n>{_safe(task)}</th>" for task in summary.metric) + "</tr>"]
    for label, row in zip(after, values, strict=True):
        cells = ["" if np.isnan(value) else f"{value:.4f}" for value in row]
        lines.append(f"<tr><td>{_safe(label)}</td>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) + "</tr>")
    return f"<details><summary>{_safe(name)}</summary><table>{''.join(lines)}</table></details>"


def _protocol(summary: Summary) -> str:
    rows = {key: value for key, value in summary.protocol.items() if key not in ("setting", "dataset")}
    lines = [
        f"<tr><td class=key>{_safe(key)}</td><td class=text>{_safe(value)}</td></tr>" for key, value in rows.items()
    ]
    return f"<table>{''.join(lines)}</table>" + _note(
        "The dataset's hash and the chosen setting are in each result line."
    )
