"""Which trials there are, in which order, in which processes. A killed run goes on with what is not there yet."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.continual import records
from benchmarks.continual.methods import LEARNERS
from benchmarks.continual.settings import GRID, Budget
from benchmarks.continual.trial import Trial, conduct, prepare_process, pretrained


@dataclass(frozen=True)
class Plan:
    """What is compared: methods on folds {name: dataset folder}, with seeds 0 .. seeds - 1.

    points  at most so many of each grid
    """

    methods: tuple[str, ...]
    folds: dict[str, str]
    seeds: int
    budget: Budget
    points: int | None = None
    tasks: tuple[str, ...] | None = None

    def grid(self, method: str) -> range:
        return range(len(GRID[method][: self.points]))

    def trial(self, method: str, fold: str, seed: int, point: int) -> Trial:
        return Trial(method, self.folds[fold], fold, seed, point, self.budget, self.tasks)


def _work(kind: str, trial: Trial, out: Path) -> None:
    prepare_process()
    if kind == "pretrain":
        pretrained(trial, out)
    else:
        records.save_trial(out, trial, *conduct(trial, out))


class Comparison:
    """Runs a plan into the folder `out`."""

    def __init__(self, plan: Plan, out: Path):
        self.plan, self.out = plan, out
        self.followed: set[str] = set()  # trials that were started after a choice
        results, matrices = (records.read_lines(out / name) for name in ("results.jsonl", "matrices.jsonl"))
        self.results = {(line["method"], line["fold"], line["seed"]) for line in results}
        self.matrices = {(line["method"], line["fold"], line["seed"]): line for line in matrices}

    def run(self, jobs: int) -> None:
        """Do what is missing, in `jobs` processes of one thread each, fold after fold: first the grid, then the other
        seeds. The next fold begins when a process would have nothing to do. A trial that fails is named at the end."""
        self._check()
        context, failed = multiprocessing.get_context("spawn"), []
        total = sum(len(list(self._first(fold))) + self._later(fold) for fold in self.plan.folds)
        with ProcessPoolExecutor(jobs, mp_context=context) as pool, tqdm(total=total, unit="trial") as bar:
            try:
                self._pretrain(pool)
                folds, waiting = list(self.plan.folds), {}
                while folds or waiting:
                    while folds and len(waiting) < jobs:
                        waiting |= self._start(pool, folds.pop(0), bar)
                    if waiting:
                        failed += self._finish(pool, waiting, bar)
            finally:
                pool.shutdown(cancel_futures=True)
        if failed:
            raise RuntimeError(f"{len(failed)} trials failed: {', '.join(failed)}; run again to repeat them")
        runs = [(fold, seed) for fold in self.plan.folds for seed in range(self.plan.seeds)]
        if lost := [f"{method}/{fold}-{seed}" for fold, seed in runs for method in self._missing(fold, seed)]:
            raise RuntimeError(
                f"training diverged, so there is no result of {', '.join(lost)}: lower the rates of the grid"
            )

    def _check(self) -> None:
        """ValueError where lines, of whatever method, were made with another budget, another package or a choice among
        more or fewer points, or of the same folds with other tasks or tables: what stands in one table must be
        comparable; where nobody knows what they were made with; and where this plan's trials have other settings.
        """
        method, path = self.plan.methods[0], self.out / "matrices.jsonl"  # of the settings each method has its own
        asked = {fold: self.plan.trial(method, fold, 0, 0).identity() for fold in self.plan.folds}
        for (name, fold, _), line in self.matrices.items():
            other = () if fold in asked else ("dataset", "tasks", "tasks_sha256")
            identity = asked.get(fold, next(iter(asked.values())))
            records.check(path, line["identity"], identity, but=("setting", *other))
            if "points" in line and name in GRID:  # older lines have none
                points = f"grid points of {name}"
                records.check(path, {points: line["points"]}, {points: len(self.plan.grid(name))})
        for method, fold, seed in sorted(self.results - self.matrices.keys()):  # of a killed run the trial is there
            if not any((self.out / "trials" / method).glob(f"{fold}-{seed}-*.json")):
                raise ValueError(
                    f"{self.out / 'results.jsonl'} has lines of {method}/{fold}-{seed} that are not in {path.name}, so "
                    "nobody knows with which budget they were made; put their matrices there, or choose another --out"
                )
        for fold in self.plan.folds:
            for method in self.plan.methods:
                point = self.choice(method, fold)
                for seed in range(1, self.plan.seeds) if point is not None else ():
                    records.load_trial(self.out, self.plan.trial(method, fold, seed, point))

    def _start(self, pool: ProcessPoolExecutor, fold: str, bar: tqdm) -> dict[Any, Trial]:
        """-> what of a fold can be done at once."""
        grid = list(self._first(fold))
        missing = [trial for trial in grid if records.load_trial(self.out, trial) is None]
        started = {pool.submit(_work, "trial", trial, self.out): trial for trial in missing}
        bar.update(len(grid) - len(missing))
        for method in self.plan.methods:
            started |= self._follow(pool, self.plan.trial(method, fold, 0, 0))
        return started

    def _finish(self, pool: ProcessPoolExecutor, waiting: dict[Any, Trial], bar: tqdm) -> list[str]:
        """Wait for some trials, and add to `waiting` what waited for them; -> those that failed."""
        failed = []
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            trial = waiting.pop(future)
            bar.update()
            bar.set_postfix_str(trial.key)
            if isinstance(future.exception(), BrokenProcessPool):
                raise future.exception()
            if future.exception() is not None:
                failed.append(trial.key)
                traceback.print_exception(future.exception())
            else:
                waiting |= self._follow(pool, trial)
        return failed

    def _missing(self, fold: str, seed: int) -> list[str]:
        """Methods of which nothing is written yet."""
        return [method for method in self.plan.methods if (method, fold, seed) not in self.matrices]

    def _pretrain(self, pool: ProcessPoolExecutor) -> None:
        runs = [(fold, seed) for fold in self.plan.folds for seed in range(self.plan.seeds)]
        learn = [run for run in runs if any(method in LEARNERS for method in self._missing(*run))]
        trials = [self.plan.trial("pcl", fold, seed, 0) for fold, seed in learn]
        for future in [pool.submit(_work, "pretrain", trial, self.out) for trial in trials]:
            future.result()

    def _first(self, fold: str) -> Iterator[Trial]:
        """Every grid point, with the first seed, of the methods whose choice is not written yet."""
        for method in self._missing(fold, 0):
            yield from (self.plan.trial(method, fold, 0, point) for point in self.plan.grid(method))

    def _later(self, fold: str) -> int:
        """Trials of a fold that wait for a choice, written ones left out."""
        return sum(len(self._missing(fold, seed)) for seed in range(1, self.plan.seeds))

    def choice(self, method: str, fold: str) -> int | None:
        """The grid point that is written, or else the best on the valid users of those that did not diverge; None while
        one is missing, or where all did."""
        if written := self.matrices.get((method, fold, 0)):
            asked = self.plan.trial(method, fold, 0, written["point"]).identity()
            records.check(self.out / "matrices.jsonl", written["identity"], asked)
            return written["point"]
        trials = [self.plan.trial(method, fold, 0, point) for point in self.plan.grid(method)]
        answers = [records.load_trial(self.out, trial) for trial in trials]
        if any(answer is None for answer in answers):
            return None
        scores = {p: answer["valid_score"] for p, answer in enumerate(answers) if "diverged" not in answer}
        return max(scores, key=scores.get, default=None)

    def _follow(self, pool: ProcessPoolExecutor, trial: Trial) -> dict[Any, Trial]:
        """After a trial: write what is final, and start what waited for it."""
        point = self.choice(trial.method, trial.fold)
        if point is None:
            return {}
        started = {}
        for seed in range(self.plan.seeds):
            other = replace(trial, seed=seed, point=point)
            if (trial.method, trial.fold, seed) in self.results and (trial.method, trial.fold, seed) in self.matrices:
                continue
            answer = records.load_trial(self.out, other)
            if answer is not None and "diverged" not in answer:
                self._write(other, answer)
            elif answer is None and other.key not in self.followed:  # two grid points may end in one moment
                self.followed.add(other.key)
                started[pool.submit(_work, "trial", other, self.out)] = other
        return started

    def _write(self, trial: Trial, answer: dict[str, Any]) -> None:
        """Add what is missing of a trial's lines."""
        key, name = (trial.method, trial.fold, trial.seed), trial.dataset().name
        if key not in self.results:
            records.append(self.out / "results.jsonl", records.lines(trial, answer, name))
            self.results.add(key)
        if key not in self.matrices:
            matrix = {"method": trial.method, "fold": trial.fold, "seed": trial.seed, "point": trial.point}
            matrix["points"] = len(self.plan.grid(trial.method))
            matrix |= {name: answer[name] for name in ("metric", "test", "valid", "identity")}
            records.append(self.out / "matrices.jsonl", [matrix])
            self.matrices[key] = matrix
