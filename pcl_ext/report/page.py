"""The report's page: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pcl_ext.report.charts import draw, number
from pcl_ext.report.content import Content, TaskResult, gather
from pcl_ext.report.parts import Cell, details, document, image, note, numbers, pairs, safe, section, table
from pcl_ext.store import read_manifest
from pcl_ext.store.atomic import write_file


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
    names, kept = ", ".join(task.name for task in content.tasks) or "none yet", content.record
    tables = {"Protocol": kept.protocol, "Dataset": kept.dataset, "Configuration": kept.config, "Machine": kept.machine}
    parts = [
        note(f"One frozen backbone; tasks in the order they were learned: {names}."),
        _cards(content),
        section("Results", _results(content)),
        section("Result matrix", _matrix(content, pictures)),
        section("Against trivial and cheap references", _references(content, pictures)),
        section("Learning curves", _curves(content, pictures)),
        section("What a task adds", _sizes(content, pictures)),
        *(section(name, _record(values, name)) for name, values in tables.items()),
    ]
    return document(f"User model on {content.title}" if content.title else "User model", parts)


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
        cards.append(_counted([d >= 3 for d in distances], "tasks at least 3 standard errors over trivial"))
    compared = [verdict(task) for task in content.tasks if task.gain("cheap") is not None]
    if compared:
        cards.append(_counted([word != "below" for word in compared], "tasks not below their cheap reference"))
    if content.tasks:
        mean = sum(task.size for task in content.tasks) / count
        share = mean / content.backbone_size
        cards.append(_card("", f"{mean / 1000:,.0f} kB", f"a task on average, {share:.1%} of the backbone"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(tone: str, value: str, text: str) -> str:
    return f'<div class="card {tone}"><b>{safe(value)}</b>{safe(text)}</div>'


def _counted(won: list[bool], text: str) -> str:
    return _card("good" if all(won) else "bad", f"{sum(won)} of {len(won)}", text)


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
        return note("No task is closed yet.")
    text = (
        "This run: value after the last task ± one standard error. Over trivial: in standard errors of this run; at "
        "least 3 is wanted. A difference from cheap inside one standard error is a tie."
    )
    if samples := content.record.samples:
        text += " Measured on a sample: " + "; ".join(f"{name}, {how}" for name, how in samples.items()) + "."
    head = ["task", "kind", "metric", *numbers(["this run", "trivial", "cheap", "over trivial"]), "against cheap"]
    return table(head, map(_result_row, content.tasks)) + note(text) + _all_metrics(content)


def _result_row(task: TaskResult) -> list[Cell]:
    value = "not measured" if task.value is None else number(task.value)
    value += f" ± {number(task.error)}" if task.error is not None else ""
    known = {key: number(reference) for key, (_, reference) in task.references.items()}
    distance = over_trivial(task)
    over = ("–", "n") if distance is None else (f"{distance:+.1f}", "n down" if distance < 3 else "n")
    tone = {"above": "up", "below": "down"}.get(verdict(task), "tie")
    cheap = task.references["cheap"][0] if "cheap" in known else ""
    against = f"{verdict(task)} ({cheap})" if cheap else "–"
    values = numbers([value, known.get("trivial", "–"), known.get("cheap", "–")])
    return [task.name, task.kind, task.metric, *values, over, (against, tone)]


def _all_metrics(content: Content) -> str:
    rows = [
        [task.name, name, *numbers([number(value), number(task.errors[name]) if name in task.errors else "–"])]
        for task in content.tasks
        for name, value in task.metrics.items()
    ]
    head = ["task", "metric", *numbers(["value", "standard error"])]
    return details("All metrics", table(head, rows)) if rows else ""


def _matrix(content: Content, pictures: Mapping[str, bytes]) -> str:
    if content.matrix is None:
        return note("The record holds no result matrix.")
    lost, best = content.matrix.forgetting("first-last"), content.matrix.forgetting("max-last")
    text = (
        "Row i, column j: task j, in its own metric, after task i was learned. Colour per column, from the trivial "
        "reference (light) to the best value known (dark): a column of one colour is a task that stayed as it was."
    )
    shown = f"<p>{text}</p>{image(pictures['matrix.png'], 'result matrix')}"
    if not lost["tasks"]:
        return shown + "<p>Forgetting needs a second task.</p>"
    rest = (
        f"Forgetting, {lost['definition']}: mean {_short(lost['mean'])}, worst {_short(lost['worst'])}. "
        f"{best['definition'].capitalize()}: mean {_short(best['mean'])}, worst {_short(best['worst'])}. "
        f"Backward transfer, mean R[last, j] - R[j, j]: {_short(content.matrix.backward_transfer())}. "
        "A positive loss is a task that got worse."
    )
    if content.record.outputs:
        rest += " The run keeps a sha256 of every task's outputs on the test users; pcl verify computes them again."
    return f"{shown}<p>{safe(rest)}</p>"


def _references(content: Content, pictures: Mapping[str, bytes]) -> str:
    if "references.png" not in pictures:
        return note("The record holds no results to compare.")
    without = [task.name for task in content.tasks if len(task.references) < 2]
    lacking = note(f"The record lacks a reference for: {', '.join(without)}.") if without else ""
    return image(pictures["references.png"], "metric against references") + lacking


def _curves(content: Content, pictures: Mapping[str, bytes]) -> str:
    if "curves.png" not in pictures:
        return note("The record holds no learning curves.")
    without = [task.name for task in content.tasks if not task.curve]
    lacking = note(f"No learning curve in the record for: {', '.join(without)}.") if without else ""
    return image(pictures["curves.png"], "learning curves") + lacking


def _sizes(content: Content, pictures: Mapping[str, bytes]) -> str:
    if "sizes.png" not in pictures:
        return note("No task is closed yet.")
    text = "<p>Size of each task's file: its prompts, readout and head.</p>"
    return text + image(pictures["sizes.png"], "file sizes")


def _record(values: Any, name: str) -> str:
    rows = list(_settings(values)) if isinstance(values, Mapping) else []
    return pairs(rows) if rows else note(f"The record holds nothing on this: {name.lower()}.")


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
