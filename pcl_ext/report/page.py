"""The report's page: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pcl_ext.report.charts import DPI, draw, number
from pcl_ext.report.content import Content, TaskResult, gather
from pcl_ext.store import read_manifest
from pcl_ext.store.atomic import write_file

CSS = """
:root { color: #1f2933; background: #f5f7fa; font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
body { max-width: 62rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; }
.quiet { color: #616e7c; font-size: .9rem; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 1.2rem 1.4rem; margin-top: 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin-top: 1.2rem; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.3; }
.good b { color: #1d7a46; } .bad b { color: #b4232c; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; }
th { font-weight: 600; color: #52606d; } tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.key { white-space: nowrap; color: #52606d; width: 1%; padding-right: 2rem; }
td.text { overflow-wrap: anywhere; }
details { margin-top: .6rem; } details table { width: auto; margin-top: .4rem; } summary { cursor: pointer; }
.up { color: #1d7a46; } .down { color: #b4232c; } .tie { color: #616e7c; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report(run_path: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html and its pictures (PNG) into the folder `out`, by default RUN/report; -> path of the page.

    The page is self-contained: the pictures are in it too. What the run's record lacks is named there as missing.
    StoreError when the run has no readable manifest, ImportError without matplotlib.
    """
    content = gather(read_manifest(run_path))
    pictures = draw(content)
    folder = Path(run_path) / "report" if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_file(folder / name, picture)
    page = folder / "report.html"
    write_file(page, _page(content, pictures).encode())
    return page


def _page(content: Content, pictures: Mapping[str, bytes]) -> str:
    record, title = content.record, f"User model on {content.title}" if content.title else "User model"
    parts = [
        f"<h1>{_safe(title)}</h1>",
        f'<p class="quiet">{_subtitle(content)}</p>',
        _cards(content),
        _section("Results", _results(content)),
        _section("Result matrix", _matrix(content, pictures)),
        _section("Against trivial and cheap references", _references(content, pictures)),
        _section("Learning curves", _curves(content, pictures)),
        _section("What a task adds", _sizes(content, pictures)),
        *(_section(name, _table(record.get(key), name)) for name, key in _TABLES.items()),
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{_safe(title)}</title><style>{CSS}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


_TABLES = {"Protocol": "protocol", "Dataset": "dataset", "Configuration": "config", "Machine": "machine"}


def _subtitle(content: Content) -> str:
    names = ", ".join(task.name for task in content.tasks) or "none yet"
    return _safe(f"One frozen backbone; tasks in the order they were learned: {names}.")


def _cards(content: Content) -> str:
    count = len(content.tasks)
    cards = [_card("", str(count), "task learned" if count == 1 else "tasks learned")]
    lost = content.matrix.forgetting() if content.matrix is not None else {"tasks": {}}
    if lost["tasks"]:
        tone = "good" if lost["worst"] <= 0 else "bad"
        text = (
            f"forgetting ({lost['definition']}): mean of R[j, j] - R[last, j] over {len(lost['tasks'])} earlier tasks"
        )
        cards.append(_card(tone, _short(lost["mean"]), text))
    distances = [distance for task in content.tasks if (distance := over_trivial(task)) is not None]
    if distances:
        won = sum(distance >= 3 for distance in distances)
        tone = "good" if won == len(distances) else "bad"
        cards.append(_card(tone, f"{won} of {len(distances)}", "tasks at least 3 standard errors over trivial"))
    compared = [task for task in content.tasks if task.gain("cheap") is not None]
    if compared:
        won = sum(verdict(task) != "below" for task in compared)
        tone = "good" if won == len(compared) else "bad"
        cards.append(_card(tone, f"{won} of {len(compared)}", "tasks not below their cheap reference"))
    if content.tasks:
        mean = sum(task.size for task in content.tasks) / count
        share = mean / content.backbone_size
        cards.append(_card("", f"{mean / 1000:,.0f} kB", f"a task on average, {share:.1%} of the backbone"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(tone: str, value: str, text: str) -> str:
    return f'<div class="card {tone}"><b>{_safe(value)}</b>{_safe(text)}</div>'


def _short(value: float) -> str:
    """0 only where it is 0."""
    return "0" if value == 0 else f"{value:.2g}"


def over_trivial(task: TaskResult) -> float | None:
    """In standard errors of the run's value."""
    gain = task.gain("trivial")
    return gain / task.error if gain is not None and task.error else None


def verdict(task: TaskResult) -> str:
    """Against the cheap reference: above, tie (inside one standard error) or below; empty when not known."""
    gain = task.gain("cheap")
    if gain is None:
        return ""
    return "tie" if abs(gain) <= (task.error or 0) else "above" if gain > 0 else "below"


def _results(content: Content) -> str:
    if not content.tasks:
        return _missing("No task is closed yet.")
    head = "<tr><th>task</th><th>kind</th><th>metric</th><th class=n>this run</th><th class=n>trivial</th>"
    head += "<th class=n>cheap</th><th class=n>over trivial</th><th>against cheap</th></tr>"
    note = (
        "This run: value after the last task ± one standard error. Over trivial: in standard errors of this run; at "
        "least 3 is wanted. A difference from cheap inside one standard error is a tie."
    )
    if samples := content.record.get("samples"):
        note += " Measured on a sample: " + "; ".join(f"{name}, {_safe(text)}" for name, text in samples.items()) + "."
    rows = "".join(map(_result_row, content.tasks))
    return f'<table>{head}{rows}</table><p class="quiet">{note}</p>{_all_metrics(content)}'


def _result_row(task: TaskResult) -> str:
    value = "not measured" if task.value is None else number(task.value)
    value += f" ± {number(task.error)}" if task.error is not None else ""
    trivial, cheap = (
        number(task.references[key][1]) if key in task.references else "–" for key in ("trivial", "cheap")
    )
    distance = over_trivial(task)
    over = "–" if distance is None else f"{distance:+.1f}"
    weak = " down" if distance is not None and distance < 3 else ""
    tone = {"above": "up", "below": "down"}.get(verdict(task), "tie")
    cheap_name = task.references["cheap"][0] if "cheap" in task.references else ""
    against = f"{verdict(task)} ({cheap_name})" if cheap_name else "–"
    cells = f"<td>{_safe(task.name)}</td><td>{_safe(task.kind)}</td><td>{_safe(task.metric)}</td>"
    cells += "".join(f"<td class=n>{_safe(text)}</td>" for text in (value, trivial, cheap))
    return f'<tr>{cells}<td class="n{weak}">{over}</td><td class="{tone}">{_safe(against)}</td></tr>'


def _all_metrics(content: Content) -> str:
    rows = [
        f"<tr><td>{_safe(task.name)}</td><td>{_safe(name)}</td><td class=n>{_safe(number(value))}</td>"
        f"<td class=n>{_safe(number(task.errors[name])) if name in task.errors else '–'}</td></tr>"
        for task in content.tasks
        for name, value in task.metrics.items()
    ]
    if not rows:
        return ""
    head = "<tr><th>task</th><th>metric</th><th class=n>value</th><th class=n>standard error</th></tr>"
    return f"<details><summary>All metrics</summary><table>{head}{''.join(rows)}</table></details>"


def _matrix(content: Content, pictures: Mapping[str, bytes]) -> str:
    if content.matrix is None:
        return _missing("The record holds no result matrix.")
    lost, best = content.matrix.forgetting("first-last"), content.matrix.forgetting("max-last")
    text = (
        "Row i, column j: task j, in its own metric, after task i was learned. Colour per column, from the trivial "
        "reference (light) to the best value known (dark): a column of one colour is a task that stayed as it was."
    )
    if not lost["tasks"]:
        return f"<p>{text}</p>{_image(pictures, 'matrix.png', 'result matrix')}<p>Forgetting needs a second task.</p>"
    rest = (
        f"Forgetting, {lost['definition']}: mean {_short(lost['mean'])}, worst {_short(lost['worst'])}. "
        f"{best['definition'].capitalize()}: mean {_short(best['mean'])}, worst {_short(best['worst'])}. "
        f"Backward transfer, mean R[last, j] - R[j, j]: {_short(content.matrix.backward_transfer())}. "
        "A positive loss is a task that got worse."
    )
    if content.record.get("outputs"):
        rest += " The run keeps a sha256 of every task's outputs on the test users; pcl verify computes them again."
    return f"<p>{text}</p>{_image(pictures, 'matrix.png', 'result matrix')}<p>{_safe(rest)}</p>"


def _references(content: Content, pictures: Mapping[str, bytes]) -> str:
    if "references.png" not in pictures:
        return _missing("The record holds no results to compare.")
    without = [task.name for task in content.tasks if len(task.references) < 2]
    note = _missing(f"The record lacks a reference for: {', '.join(without)}.") if without else ""
    return _image(pictures, "references.png", "metric against references") + note


def _curves(content: Content, pictures: Mapping[str, bytes]) -> str:
    without = [task.name for task in content.tasks if not task.curve]
    if "curves.png" not in pictures:
        return _missing("The record holds no learning curves.")
    note = _missing(f"No learning curve in the record for: {', '.join(without)}.") if without else ""
    return _image(pictures, "curves.png", "learning curves") + note


def _sizes(content: Content, pictures: Mapping[str, bytes]) -> str:
    if "sizes.png" not in pictures:
        return _missing("No task is closed yet.")
    return "<p>Size of each task's file: its prompts, readout and head.</p>" + _image(
        pictures, "sizes.png", "file sizes"
    )


def _table(values: Any, name: str) -> str:
    rows = list(_settings(values)) if isinstance(values, Mapping) else []
    if not rows:
        return _missing(f"The record holds nothing on this: {name.lower()}.")
    cells = (f"<tr><td class=key>{_safe(key)}</td><td class=text>{_safe(value)}</td></tr>" for key, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _settings(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Flat rows; what all of `tasks` have in common is said once."""
    tasks = values.get("tasks")
    if not isinstance(tasks, Mapping) or not all(isinstance(task, Mapping) for task in tasks.values()):
        yield from _flat(values)
        return
    yield from _flat({key: value for key, value in values.items() if key != "tasks"})
    flat = {name: dict(_flat(task)) for name, task in tasks.items()}
    for key in dict.fromkeys(key for task in flat.values() for key in task):
        if len({task.get(key) for task in flat.values()}) == 1:
            yield f"every task: {key}", next(iter(flat.values()))[key]
        else:
            yield from ((f"{name}: {key}", task[key]) for name, task in flat.items() if key in task)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        elif value is None or isinstance(value, bool):
            yield f"{prefix}{key}", {None: "default", True: "yes", False: "no"}[value]
        else:
            yield f"{prefix}{key}", str(value)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_safe(title)}</h2>{body}</section>"


def _image(pictures: Mapping[str, bytes], name: str, alt: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    width = int.from_bytes(pictures[name][16:20], "big") * 100 // DPI  # from the PNG's own header; letters of one size
    return f'<img alt="{_safe(alt)}" width="{width}" src="data:image/png;base64,{data}">'


def _missing(text: str) -> str:
    return f'<p class="quiet">{_safe(text)}</p>'


def _safe(text: str) -> str:
    return html.escape(str(text), quote=True)
