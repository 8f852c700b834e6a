"""Run the comparison: methods x tasks x folds x seeds, resumable, and write its report.

DATA is a dataset folder, or a folder of them (rotated folds): each subfolder with a dataset.json is a fold by its name.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.continual.methods import NAMES
from benchmarks.continual.page import write_page
from benchmarks.continual.picture import write_picture
from benchmarks.continual.schedule import Comparison, Plan
from benchmarks.continual.settings import QUICK, STOPS, Budget
from benchmarks.continual.table import write_table
from pcl_ext import store
from pcl_ext.data import Dataset


def folds_of(data: Path, wanted: list[str] | None) -> dict[str, str]:
    """{fold name: dataset folder}."""
    if (data / "dataset.json").is_file():
        found = {data.name: str(data)}
    else:
        found = {path.parent.name: str(path.parent) for path in sorted(data.glob("*/dataset.json"))}
    if not found:
        raise SystemExit(f"{data} is neither a dataset folder nor a folder of them: no dataset.json; see pcl prepare")
    if unknown := sorted(set(wanted or ()) - set(found)):
        raise SystemExit(f"--folds must be among {', '.join(found)}, got {', '.join(unknown)}")
    folds = {name: path for name, path in found.items() if not wanted or name in wanted}
    for path in folds.values():
        if not set(Dataset(path).task_names) - {"next"}:
            raise SystemExit(f"{path} has no task but next: nothing to learn after pretraining")
    return folds


def count(text: str) -> int:
    """A whole number from 1 up, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a comparison and its studies are both asked for; see `asked`."""
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder, or a folder of rotated folds")
    parser.add_argument("--out", type=Path, required=True, help="where everything is kept; the same again resumes")
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--folds", nargs="+", help="some of the folds, by the names of their folders")
    parser.add_argument("--jobs", type=count, default=2, help="processes, of one thread each")
    parser.add_argument("--stop", choices=STOPS, default=STOPS[0], help="what early stopping watches on valid users")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: one fold, one seed, few epochs, no grid")


def asked(options: argparse.Namespace) -> tuple[dict[str, str], int, Budget]:
    """-> folds, seeds, budget."""
    folds = folds_of(options.data, options.folds)
    if options.quick:
        return dict(list(folds.items())[:1]), 1, replace(QUICK, stop=options.stop)
    return folds, options.seeds, Budget(stop=options.stop)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.continual", description=__doc__)
    add_options(parser)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="METHOD", help=", ".join(NAMES))
    parser.add_argument("--points", type=count, help="at most so many points of each grid")
    options = parser.parse_args(arguments)
    folds, seeds, budget = asked(options)
    points = 1 if options.quick else options.points
    plan = Plan(tuple(options.methods), folds, seeds, budget, points)
    options.out.mkdir(parents=True, exist_ok=True)
    with store.lock(options.out):
        try:
            Comparison(plan, options.out).run(options.jobs)
        finally:
            if (options.out / "results.jsonl").exists():
                written = write_page(options.out), write_table(options.out), write_picture(options.out)
                print(*filter(None, written), sep="\n")


if __name__ == "__main__":
    main()
