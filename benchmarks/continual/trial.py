"""One trial: a method, at one grid point and seed, learns the tasks of one dataset; all that is measured of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.continual.labels import open_dataset
from benchmarks.continual.learner import Learner, World, score
from benchmarks.continual.methods import LEARNERS, REFERENCES
from benchmarks.continual.settings import GRID, Budget, Setting
from pcl_ext import __version__, run, store
from pcl_ext.data import Dataset
from pcl_ext.metrics import TaskMetrics
from pcl_ext.model import MemoryConfig
from pcl_ext.task import TaskSpec
from pcl_ext.train import LearnConfig, PretrainConfig


@dataclass(frozen=True)
class Trial:
    """Which trial: a method of the grid, on the dataset at `data`, called `fold`.

    tasks    after T1, in this order; None: all, by name
    setting  None: the grid's own point; label: what such a trial is called
    """

    method: str
    data: str
    fold: str
    seed: int
    point: int
    budget: Budget
    tasks: tuple[str, ...] | None = None
    setting: Setting | None = None
    label: str | None = None

    @property
    def key(self) -> str:
        return f"{self.label or self.method}/{self.fold}-{self.seed}-{self.point}"

    @property
    def chosen(self) -> Setting:
        return self.setting or GRID[self.method][self.point]

    def dataset(self) -> Dataset:
        return open_dataset(self.data, self.budget.label_share, self.seed)

    def backbone(self, out: Path) -> Path:
        """The run folder of the backbone, shared by all methods of a fold and seed."""
        return out / "backbones" / f"{self.fold}-{self.seed}-d{self.budget.dim}"

    def identity(self) -> dict[str, Any]:
        """What a stored answer must have been made with; of the package its version and its own defaults."""
        dataset = self.dataset()
        tasks = list(self.order(dataset))
        return {
            "setting": asdict(self.chosen),
            "budget": asdict(self.budget),
            "dataset": dataset.sha256,
            "tasks": tasks,
            "tasks_sha256": {name: dataset.task_sha256(name) for name in ("next", *tasks)},
            "package": __version__,
            "defaults": {
                "pretrain": asdict(PretrainConfig()),
                "learn": asdict(LearnConfig()),
                "memory": asdict(MemoryConfig()),
            },
        }

    def order(self, dataset: Dataset) -> tuple[str, ...]:
        return tuple(n for n in dataset.task_names if n != "next") if self.tasks is None else self.tasks


def prepare_process() -> None:
    """One thread, in which denormal numbers are 0: closing gates make weights of them, and they slow products down."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def pretrained(trial: Trial, out: Path):
    """The backbone that all methods of a fold and seed share; made where it is not there yet."""
    budget, dataset = trial.budget, trial.dataset()
    shape = {"dim": budget.dim, "num_layers": budget.num_layers, "max_len": budget.max_len}
    config = PretrainConfig(epochs=budget.pretrain_epochs, seed=trial.seed)
    return run.pretrain(dataset, trial.backbone(out), shape, config)


def make_learner(trial: Trial, out: Path) -> Learner:
    dataset = trial.dataset()
    model = store.from_pretrained(trial.backbone(out))
    world = World(dataset, trial.order(dataset), trial.budget, trial.chosen, trial.seed)
    torch.manual_seed(trial.seed)
    return LEARNERS[trial.method](model, world)


def conduct(trial: Trial, out: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """-> (JSON values, arrays of the last test outputs): see `measure_all`.

    Seconds are of the processor, which one thread uses: other work on the machine does not count. Where training
    diverged there is nothing but the reason, "diverged".

    test, valid  rows of the result matrix, [{"after", "values": {task: value}}], in each task's own metric
    """
    started = time.process_time()
    if trial.method in REFERENCES:
        answer, outputs = _reference(trial), {}
    else:
        learner = make_learner(trial, out)
        try:
            answer, outputs = teach(learner)
        except FloatingPointError as error:
            answer, outputs = {"diverged": str(error)}, {}
    answer |= {"key": trial.key, "identity": trial.identity(), "total_seconds": time.process_time() - started}
    return answer, outputs


def teach(learner: Learner) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All tasks, one after another or at once; a row of the matrix after each."""
    test, valid, names, outputs = [], [], ["next", *learner.world.tasks], {}

    def measure(after: str, known: list[str]) -> None:
        outputs.clear()
        for rows, fold in ((test, "test"), (valid, "valid")):
            keep = outputs if fold == "test" else None
            rows.append({"after": after, "values": {name: measure_one(learner, name, fold, keep) for name in known}})

    if learner.joint:
        learner.learn_all()
        measure("all", names)
    else:
        started = time.process_time()
        learner.first()
        learner.seconds["next"] = time.process_time() - started
        measure("next", ["next"])
        for place, name in enumerate(learner.world.tasks):
            learner.learn(name)
            measure(name, names[: place + 2])
    specs = {name: learner.world.dataset.task(name).spec for name in names}
    last = valid[-1]["values"]
    return {
        "metric": {name: spec.metric for name, spec in specs.items()},
        "test": test,
        "valid": valid,
        "valid_score": sum(score(specs[n], {specs[n].metric: v}) for n, v in last.items()) / len(last),
        "parameters": {name: learner.parameters_of(name) for name in names},
        "seconds": learner.seconds,
    }, outputs


def measure_one(
    learner: Learner,
    name: str,
    fold: str = "test",
    outputs: dict[str, np.ndarray] | None = None,
    newest: int | None = None,
) -> float:
    """A task's own metric; newest: of each history only so many events are known.

    outputs takes what the bootstrap needs of every test target: the user, the label, and the output, or for items the
    value of the metric.
    """
    users, values, labels = [], [], []
    spec, examples = learner.model.task(name).spec, learner.world.dataset.examples(name, fold)

    def keep(batch, output, columns) -> None:
        users.append(examples.user[batch.index][batch.target_row])
        labels.append(columns)
        values.append(_target_values(spec, output, columns, batch.target_row))

    metrics, _ = learner.measure(name, fold, None if outputs is None else keep, newest)
    if outputs is not None:
        for part, tensors in (("user", users), ("value", values), ("label", labels)):
            outputs[f"{name}/{part}"] = torch.cat(tensors).numpy()
    return metrics[spec.metric]


def _target_values(spec: TaskSpec, output: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if spec.kind != "items":
        return output[rows]
    metrics = TaskMetrics(spec)
    metrics.update(output, columns, rows)
    return metrics.values(spec.metric)


def _reference(trial: Trial) -> dict[str, Any]:
    """Popularity, or the cheap reference: no matrix but its last row; and what each is, "reference"."""
    dataset, rows, seconds, what = trial.dataset(), {}, {}, {}
    names = ("next", *trial.order(dataset))
    for fold in ("test", "valid"):
        values = {}
        for name in names:
            started = time.process_time()
            answer = REFERENCES[trial.method](dataset, name, fold)
            values[name] = answer["metrics"][dataset.task(name).spec.metric]
            seconds[name] = time.process_time() - started
            if fold == "test":
                what[name] = answer["name"]
        rows[fold] = [{"after": "all", "values": values}]
    metric = {name: dataset.task(name).spec.metric for name in names}
    nothing = dict.fromkeys(names, 0)
    return rows | {
        "metric": metric,
        "valid_score": 0.0,
        "parameters": nothing,
        "seconds": seconds,
        "reference": what,
    }
