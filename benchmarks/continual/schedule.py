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
from benchmarks.continual.settings import GRID, Budget
from benchmarks.continual.trial import Trial, conduct, pretrained


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
    import torch

    torch.set_num_threads(1)
    if kind == "pretrain":
        pretrained(trial, out)
    else:
        records.save_trial(out, trial, *conduct(trial, out))


class Comparison:
    """Runs a plan into the folder `out`."""

    def __init__(self, plan: Plan, out: Path):
        self.plan, self.out = plan, out
        self.followed: set[str] = set()  # trials of later seeds that were counted or started
        written = records.read_lines(out / "results.jsonl")
        self.written = {(line["method"], line["fold"], line["seed"]) for line in written}

    def run(self, jobs: int) -> None:
        """Do what is missing, in `jobs` processes of one thread each, fold after fold: first the grid, then the other
        seeds. A trial that fails is named at the end."""
        context, failed = multiprocessing.get_context("spawn"), []
        total = sum(1 for fold in self.plan.folds for _ in self._first(fold)) + len(self.plan.folds) * self._later()
        with ProcessPoolExecutor(jobs, mp_context=context) as pool, tqdm(total=total, unit="trial") as bar:
            self._pretrain(pool)
            for fold in self.plan.folds:
                failed += self._run_fold(pool, fold, bar)
        if failed:
            raise RuntimeError(f"{len(failed)} trials failed: {', '.join(failed)}; run again to repeat them")

    def _run_fold(self, pool: ProcessPoolExecutor, fold: str, bar: tqdm) -> list[str]:
        """-> the trials that failed."""
        failed, grid = [], list(self._first(fold))
        missing = [trial for trial in grid if records.load_trial(self.out, trial) is None]
        waiting = {pool.submit(_work, "trial", trial, self.out): trial for trial in missing}
        bar.update(len(grid) - len(missing))
        for method in self.plan.methods:
            waiting |= self._follow(pool, self.plan.trial(method, fold, 0, 0), bar)
        while waiting:
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
                    waiting |= self._follow(pool, trial, bar)
        return failed

    def _pretrain(self, pool: ProcessPoolExecutor) -> None:
        trials = [self.plan.trial("pcl", fold, seed, 0) for fold in self.plan.folds for seed in range(self.plan.seeds)]
        for future in [pool.submit(_work, "pretrain", trial, self.out) for trial in trials]:
            future.result()

    def _first(self, fold: str) -> Iterator[Trial]:
        """Every grid point, with the first seed."""
        for method in self.plan.methods:
            yield from (self.plan.trial(method, fold, 0, point) for point in self.plan.grid(method))

    def _later(self) -> int:
        """Trials of a fold that wait for a choice."""
        return len(self.plan.methods) * (self.plan.seeds - 1)

    def choice(self, method: str, fold: str) -> int | None:
        """The grid point that is best on the valid users; None while one is missing."""
        trials = [self.plan.trial(method, fold, 0, point) for point in self.plan.grid(method)]
        answers = [records.load_trial(self.out, trial) for trial in trials]
        if any(answer is None for answer in answers):
            return None
        return max(range(len(answers)), key=lambda point: answers[point]["valid_score"])

    def _follow(self, pool: ProcessPoolExecutor, trial: Trial, bar: tqdm) -> dict[Any, Trial]:
        """After a trial: write what is final, and start what waited for it."""
        point = self.choice(trial.method, trial.fold)
        if point is None:
            return {}
        started = {}
        for seed in range(self.plan.seeds):
            other = replace(trial, seed=seed, point=point)
            answer = records.load_trial(self.out, other)
            if answer is not None:
                self._write(other, answer)
            if trial.seed > 0 or seed == 0 or other.key in self.followed:  # two grid points may end in one moment
                continue
            self.followed.add(other.key)
            if answer is not None:
                bar.update()
            else:
                started[pool.submit(_work, "trial", other, self.out)] = other
        return started

    def _write(self, trial: Trial, answer: dict[str, Any]) -> None:
        """Add a trial's lines, once."""
        key = (trial.method, trial.fold, trial.seed)
        if key in self.written:
            return
        name = trial.dataset().name
        matrix = {"method": trial.method, "fold": trial.fold, "seed": trial.seed, "point": trial.point}
        matrix |= {name: answer[name] for name in ("metric", "test", "valid", "identity")}
        records.append(self.out / "matrices.jsonl", [matrix])
        records.append(self.out / "results.jsonl", records.lines(trial, answer, name))
        self.written.add(key)
