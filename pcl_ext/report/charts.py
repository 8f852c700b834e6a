"""The report's pictures, each a PNG in memory; None where there is nothing to draw."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from pcl_ext.metrics import higher_is_better
from pcl_ext.report.content import Content, TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
_MOST_NUMBERS = 26  # tasks: beyond, cells of the result matrix are too small for theirs
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OURS, CHEAP, TRIVIAL = "#1f6feb", "#d9822b", "#9aa5b1"
_STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(content: Content) -> dict[str, bytes]:
    """{file name: PNG} of every picture for which there is something to draw."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install '.[cli]' in the sources of pcl_ext") from error
    made = {"matrix": heat_map, "references": references, "curves": curves, "sizes": sizes}
    with matplotlib.rc_context(_STYLE):
        figures = {name: make(content) for name, make in made.items()}
        return {f"{name}.png": png(figure) for name, figure in figures.items() if figure is not None}


def number(value: float) -> str:
    """A metric's value, with as many digits as mean something."""
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f}"


def label(text: str, length: int = 22) -> str:
    """Text as matplotlib may show it: one line, short, no formulas."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """Of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def heat_map(content: Content) -> Figure | None:
    """R[i, j], coloured per column from trivial (light) to the best that was reached (dark)."""
    matrix = content.matrix
    if matrix is None:
        return None
    count = len(matrix.rows)
    figure = new_figure(min(2.0 + 0.85 * count, 24), min(1.0 + 0.42 * count, 18))
    axes = figure.add_subplot()
    shade = shades(content)
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    colours = colormaps["Blues"]
    cells = np.broadcast_to(to_rgba("#f5f7fa"), (count, count, 4)).copy()
    for i in range(count):
        for j in range(i + 1):
            strength = 0.12 + 0.68 * shade[j][i]
            cells[i, j] = colours(strength)
            if count <= _MOST_NUMBERS:
                ink = "white" if strength > 0.55 else INK
                axes.text(j, i, number(matrix.value(i, j)), ha="center", va="center", color=ink, fontsize=9)
    edges = np.arange(count + 1) - 0.5
    axes.pcolormesh(edges, edges, cells, edgecolors="white", linewidth=1)
    names = matrix.tasks[:count]
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), ylabel="after learning")
    axes.set_xticks(range(count), [f"{label(task, 14)}\n{matrix.metric[task]}" for task in names])
    axes.set_yticks(range(count), [label(task) for task in names])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def shades(content: Content) -> list[list[float]]:
    """For each column j and row i, 0 (no better than trivial) .. 1 (as good as the best known, cheap included)."""
    matrix, known = content.matrix, {task.name: task.references for task in content.tasks}
    columns = []
    for j, task in enumerate(matrix.tasks[: len(matrix.rows)]):
        sign = 1 if higher_is_better(matrix.metric[task]) else -1
        values = [sign * matrix.value(i, j) for i in range(j, len(matrix.rows))]
        others = {key: sign * value for key, (_, value) in known.get(task, {}).items()}
        low, high = others.get("trivial", min(values)), max([*values, *others.values()])
        scaled = [min(max((v - low) / (high - low), 0.0), 1.0) if high > low else 0.5 for v in values]
        columns.append([0.0] * j + scaled)
    return columns


def references(content: Content) -> Figure | None:
    """Each task on a scale of its own: trivial, cheap, and ours with three standard errors either way."""
    tasks = [task for task in content.tasks if task.value is not None]
    if not tasks:
        return None
    figure = new_figure(8.2, 0.45 + 0.62 * len(tasks))
    rows = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for axes, task in zip(rows, tasks, strict=True):
        _reference_row(axes, task)
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=3, frameon=False)
    return figure


def _reference_row(axes: Axes, task: TaskResult) -> None:
    axes.axhline(0, color=GRID, zorder=0)
    for key, colour, marker in (("trivial", TRIVIAL, "o"), ("cheap", CHEAP, "s")):
        if key in task.references:
            axes.plot(
                task.references[key][1], 0, marker, color=colour, markersize=7, label=f"{key} reference", ls="none"
            )
    spread = 3 * task.error if task.error is not None else None
    axes.errorbar(
        task.value, 0, xerr=spread, fmt="D", color=OURS, markersize=7, capsize=4, label="this run, ± 3 standard errors"
    )
    axes.annotate(
        number(task.value),
        (task.value, 0),
        (0, 7),
        textcoords="offset points",
        ha="center",
        color=OURS,
        fontweight="bold",
    )
    axes.set_ylim(-1, 1.6)
    better = "" if higher_is_better(task.metric) else " (less is better)"
    axes.set_yticks([0], [f"{label(task.name)}\n{task.metric}{better}"])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=MUTED)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.12)


def curves(content: Content) -> Figure | None:
    """A panel a task: loss while training, the reported metric on the validation users, the epoch that was kept."""
    tasks = [task for task in content.tasks if task.curve]
    if not tasks:
        return None
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = new_figure(3.4 * across, 0.4 + 2.2 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        lines |= _curve_panel(axes, task)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.legend(list(lines.values()), list(lines), loc="outside upper right", ncols=3, frameon=False)
    return figure


def _curve_panel(axes: Axes, task: TaskResult) -> dict[str, Any]:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(label(task.name), loc="left")
    axes.set_xlabel("epoch", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8)
    lines = {}
    mark = "o" if len(task.curve) == 1 else ""
    loss = [(p["epoch"], p["loss"]) for p in task.curve]
    (lines["training loss (left)"],) = axes.plot(*zip(*loss, strict=True), color=MUTED, lw=1.4, marker=mark)
    axes.tick_params(axis="y", colors=MUTED)
    valid = [(p["epoch"], p["valid"][task.metric], p["best"]) for p in task.curve if task.metric in p["valid"]]
    if valid:
        right = axes.twinx()
        right.spines[["top", "left"]].set_visible(False)
        right.spines["right"].set(visible=True, color=OURS)
        right.tick_params(axis="y", colors=OURS, labelsize=8)
        right.set_ylabel(task.metric, color=OURS)
        epochs, values, best = zip(*valid, strict=True)
        (lines["validation metric (right)"],) = right.plot(epochs, values, color=OURS, lw=1.6, marker=mark)
        kept = [(e, v) for e, v, b in valid if b][-1:]
        for epoch, value in kept:
            right.axvline(epoch, color=CHEAP, lw=1, ls=":")
            (lines["kept epoch"],) = right.plot(epoch, value, "o", color=CHEAP, markersize=6, ls="none")
    return lines


def sizes(content: Content) -> Figure | None:
    """Kilobytes of every file: what a task adds, beside the backbone they share."""
    if not content.tasks:
        return None
    names = ["backbone (shared)", *(task.name for task in content.tasks)]
    kilobytes = [content.backbone_size / 1000, *(task.size / 1000 for task in content.tasks)]
    figure = new_figure(8.2, 0.6 + 0.3 * len(names))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), kilobytes, color=[MUTED] + [OURS] * len(content.tasks), height=0.65)
    axes.bar_label(bars, [f"{size:,.1f}" for size in kilobytes], padding=4, fontsize=8)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("kilobytes (1,000 bytes)", color=MUTED)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="y", length=0)
    return figure
