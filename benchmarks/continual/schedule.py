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
        written = records.read_lines(out / "results.jsonl")
        self.written = {(line["method"], line["fold"], line["seed"]) for line in written}

    def run(self, jobs: int) -> None:
        """Do what is missing, in `jobs` processes of one thread each. A trial that fails is named at the end."""
        context, failed = multiprocessing.get_context("spawn"), []
        total = sum(1 for _ in self._first()) + sum(1 for _ in self._later())
        with ProcessPoolExecutor(jobs, mp_context=context) as pool, tqdm(total=total, unit="trial") as bar:
            self._pretrain(pool)
            waiting = {pool.submit(_work, "trial", trial, self.out): trial for trial in self._missing(self._first())}
            bar.update(total - len(waiting) - sum(1 for _ in self._later()))
            for trial in self._done_first():
                waiting |= self._follow(pool, trial, bar)
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
        if failed:
            raise RuntimeError(f"{len(failed)} trials failed: {', '.join(failed)}; run again to repeat them")

    def _pretrain(self, pool: ProcessPoolExecutor) -> None:
        trials = [self.plan.trial("pcl", fold, seed, 0) for fold in self.plan.folds for seed in range(self.plan.seeds)]
        for future in [pool.submit(_work, "pretrain", trial, self.out) for trial in trials]:
            future.result()

    def _first(self) -> Iterator[Trial]:
        """Every grid point, with the first seed."""
        for fold in self.plan.folds:
            for method in self.plan.methods:
                yield from (self.plan.trial(method, fold, 0, point) for point in self.plan.grid(method))

    def _later(self) -> Iterator[tuple[str, str, int]]:
        """Methods, folds and seeds that wait for a choice."""
        for fold in self.plan.folds:
            for method in self.plan.methods:
                yield from ((method, fold, seed) for seed in range(1, self.plan.seeds))

    def _missing(self, trials: Iterator[Trial]) -> list[Trial]:
        return [trial for trial in trials if records.load_trial(self.out, trial) is None]

    def _done_first(self) -> list[Trial]:
        """One trial of every method and fold whose grid is complete."""
        starts = [self.plan.trial(m, f, 0, 0) for f in self.plan.folds for m in self.plan.methods]
        return [trial for trial in starts if self.choice(trial.method, trial.fold) is not None]

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
                if trial.seed == 0 and seed > 0:
                    bar.update()
            elif trial.seed == 0:
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
