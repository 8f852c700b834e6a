"""Learner: what a method is to the shared loop. A baseline overrides the few methods in which it differs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.continual.loop import Run, train
from benchmarks.continual.settings import Budget, Setting, readout_of
from pcl_ext.batch import PackedBatch
from pcl_ext.data import Dataset, ExampleBatch, Examples, make_batch, plan
from pcl_ext.infer import MOST_SCORES, fit_head_on
from pcl_ext.item_start import start_items
from pcl_ext.metrics import TaskMetrics, higher_is_better
from pcl_ext.model import Backbone, LayerPrefix, MemoryConfig, Task, UserModel, task_loss
from pcl_ext.model.encoded import Encoded, encode
from pcl_ext.next_item import NextItemLoss
from pcl_ext.train import LearnConfig, PretrainConfig, adamw, epoch_batches, task_rates

BACKBONE_DECAY = 0.01  # as in pretraining


@dataclass(frozen=True)
class World:
    """What a method learns from: the dataset, the tasks after T1 in their order, budget, grid point and seed."""

    dataset: Dataset
    tasks: tuple[str, ...]
    budget: Budget
    setting: Setting
    seed: int

    def learn_config(self, epochs: int | None = None) -> LearnConfig:
        setting, budget = self.setting, self.budget
        return LearnConfig(
            epochs=epochs or budget.epochs,
            patience=budget.patience,
            learning_rate=setting.memory_rate,
            head_rate=setting.head_rate,
            seed=self.seed,
        )

    def train_examples(self, name: str) -> Examples:
        return self.dataset.examples(name, "train")


class View:
    """A backbone read through other weights: {parameter name: tensor}; called as the backbone is."""

    def __init__(self, backbone: Backbone, weights: dict[str, Tensor]):
        self.backbone, self.weights = backbone, weights
        self.config, self.table = backbone.config, weights.get("table", backbone.table)

    def __call__(self, *inputs) -> list[Tensor]:
        return functional_call(self.backbone, self.weights, inputs)


class Learner(nn.Module):
    """A user model and the way in which one method teaches it.

    The loop calls `begin`, then for every step `loss`, `before_step` (gradients are there) and `after_step` (weights
    have moved), then `end`. `output` is what is measured.

    model     the pretrained model: a frozen backbone and T1, "next", closed
    joint     whether all tasks are learned at once (`learn_all`), not one after another (`learn`)
    adapts    whether the method trains a backbone of its own, a copy of the pretrained one
    scratch   whether that backbone starts at random instead
    """

    joint = False
    adapts = False
    scratch = False

    def __init__(self, model: UserModel, world: World):
        super().__init__()
        self.world, self.model = world, model
        self.progress = 0.0  # of the epoch, 0..1
        self.seconds: dict[str, float] = {}
        if self.adapts:
            self.model = UserModel(trainable_copy(model.backbone))
            self.model.tasks["next"] = model.tasks["next"]

    # what a baseline overrides

    def first(self) -> None:
        """Take over T1: the backbone as it was pretrained."""

    def begin(self, name: str) -> None:
        """Before a task is learned: its readout and head are there, at their start."""

    def trained(self) -> list[nn.Parameter]:
        """What learns at the method's own rate, besides readout and head."""
        return list(self.model.backbone.parameters())

    def groups(self) -> list[dict[str, Any]]:
        """The same as groups of `adamw`."""
        return [{"params": self.trained(), "lr": self.world.setting.rate, "weight_decay": BACKBONE_DECAY}]

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        return self.task_loss(batch, name)

    def before_step(self) -> None:
        """Gradients are there."""

    def after_step(self) -> None:
        """Weights have moved."""

    def end(self, name: str) -> None:
        """After a task was learned, its best epoch restored."""

    def view(self, name: str) -> Backbone | View:
        """The backbone as a task reads it."""
        return self.model.backbone

    def prefix(self, history: PackedBatch, name: str) -> LayerPrefix | None:
        """What a task puts in front of histories."""
        return None

    def extra_parameters(self, name: str) -> float:
        """Numbers of 32 bits that the task stores besides readout and head."""
        return 0

    # what the loop uses

    def memory(self, name: str) -> MemoryConfig:
        return readout_of(self.world.setting)

    def encode(self, history: PackedBatch, name: str, view: Backbone | View | None = None) -> Encoded:
        task, view = self.model.task(name), self.view(name) if view is None else view
        return encode(view, history, prefix=self.prefix(history, name), every_state=task.every_state)

    def output(self, history: PackedBatch, name: str) -> Tensor:
        view = self.view(name)
        return self.model.task(name)(self.encode(history, name, view), view.table)

    def task_groups(self, task: Task, factor: float) -> list[dict[str, Any]]:
        """Readout and head of a task that learns, as groups of `adamw`; factor: on their learning rates."""
        return task_rates(task, self.world.learn_config(), factor)

    def task_loss(self, batch: ExampleBatch, name: str) -> Tensor:
        task = self.model.task(name)
        return task.loss(self.output(batch.history, name), task.columns(batch.target), batch.target_row)

    def generator(self) -> torch.Generator:
        """For what is drawn anew for every task: the draws of no other. Torch's own begins alike for all of them."""
        return torch.Generator().manual_seed(1000 * self.world.seed + len(self.model.tasks))

    def learn(self, name: str) -> None:
        """One task from start to end."""
        started = time.process_time()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.world.seed)
            self.start_task(name)
            self.begin(name)
            self.fit_head(name)
            self.fit(name)
            self.end(name)
        self.model.task(name).close()
        self.seconds[name] = time.process_time() - started

    def start_task(self, name: str) -> Task:
        return self.model.add_task(self.world.dataset.task(name).spec, self.memory(name))

    def fit(self, name: str, epochs: int | None = None) -> None:
        """Train what is trainable for a task until its valid users say stop."""
        config, examples = self.world.learn_config(epochs), self.world.train_examples(name)
        max_len = self.model.backbone.config.max_len

        def batches(epoch: int) -> tuple[int, Iterator[ExampleBatch]]:
            return epoch_batches(self.world.dataset, examples, config, max_len, epoch, 0, self.most_examples(name))

        self._train([name], batches, lambda batch: self.loss(batch, name), config)

    def most_examples(self, name: str) -> int:
        """How many examples are scored together: fewer over a large catalogue, as in `learn_task`."""
        return max(1, MOST_SCORES // self.model.task(name).spec.num_outputs(self.world.dataset.num_items))

    def fit_next(self, epochs: int) -> None:
        """Train what is trainable on T1, as in pretraining."""
        config = PretrainConfig(epochs=epochs, patience=self.world.budget.patience, seed=self.world.seed)
        config = replace(config, learning_rate=self.world.setting.rate)
        self._train(["next"], *self.next_problem(config), config)

    def next_problem(self, config: PretrainConfig) -> tuple[Callable, Callable]:
        """(batches of an epoch, loss) of T1: every position of the train users' histories."""
        dataset, max_len = self.world.dataset, self.model.backbone.config.max_len
        examples = dataset.sequences("train", max_len)
        # over all items: a sample would read the backbone's own table, not the view's
        items = NextItemLoss(self.model.backbone, self.model.task("next"), dataset)

        def loss(batch: ExampleBatch) -> Tensor:
            items.backbone = self.view("next")
            return items(batch) + self.penalty("next")

        return lambda epoch: epoch_batches(dataset, examples, config, max_len + 1, epoch, 0), loss

    def penalty(self, name: str) -> Tensor | float:
        """Added to the loss of T1 where a method takes it over."""
        return 0.0

    def _train(self, names: list[str], batches: Callable, loss: Callable[[Any], Tensor], config) -> None:
        steps = config.epochs * batches(0)[0]
        opened = [self.model.task(name) for name in names if not self.model.task(name).closed]
        learn = self.world.learn_config()
        factors = {task: learn.ridge_rate if task.cold and learn.ridge else 1.0 for task in opened}
        groups = [group for task, factor in factors.items() for group in self.task_groups(task, factor)]
        optimizer = adamw([*groups, *self.groups()], learn, steps)
        ready = [task.spec.name for task, factor in factors.items() if factor < 1]  # their start has learned something
        start, score = (lambda: self.epoch_score(ready)) if ready else None, lambda: self.epoch_score(names)
        least = config.least_epochs if set(names) - {"next", *ready} else 0
        train(self, optimizer, Run(batches, loss, score, config.epochs, config.patience, start, least))

    @torch.no_grad()
    def fit_head(self, name: str, most: int = 20_000) -> None:
        """Start a task's head at the base rates of its training data, on standardised features; a cold catalogue at the
        ridge regression that PCL starts it at: the same readout for every method."""
        task = self.model.task(name)
        self.eval()
        batches = batches_of(self.world.dataset, self.world.train_examples(name), self.model, seed=0)
        fit_head_on(task, batches, lambda history: task.features(self.encode(history, name)), most)
        if task.cold and (strengths := self.world.learn_config().ridge):
            start_items(self.model, self.world.dataset, name, strengths, lambda: self.valid_score(name))

    def epoch_score(self, names: list[str]) -> float:
        """What decides which epoch is kept, when these tasks are learned together."""
        (name,) = names
        return self.valid_score(name)

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        self.model.train(mode)  # what is frozen stays in evaluation mode
        return self

    @torch.no_grad()
    def valid_score(self, name: str) -> float:
        """What early stopping watches, more is better: the metric's logarithm, or the loss, as `Budget.stop` says."""
        self.eval()
        (values, loss), spec = self.measure(name, "valid"), self.model.task(name).spec
        stop = self.world.budget.stop
        by_loss = stop == "loss" or (stop == "mixed" and spec.kind != "items")
        return -loss if by_loss else score(spec, values)

    @torch.no_grad()
    def measure(
        self, name: str, fold: str, keep: Callable | None = None, newest: int | None = None
    ) -> tuple[dict[str, float], float]:
        """Metrics and mean loss of a task on the users of a fold.

        keep sees every batch, its output and the columns of its targets; newest: of a history only so many events.
        """
        self.eval()
        task, total = self.model.task(name), 0.0
        metrics, examples = TaskMetrics(task.spec), self.world.dataset.examples(name, fold)
        for batch in batches_of(self.world.dataset, examples, self.model, None, newest, self.most_examples(name)):
            output, columns = self.output(batch.history, name).float(), task.columns(batch.target)
            metrics.update(output, columns, batch.target_row)
            total += float(task_loss(task.spec, output, columns, batch.target_row)) * len(columns)
            if keep is not None:
                keep(batch, output, columns)
        return metrics.compute(), total / metrics.count

    def parameters_of(self, name: str) -> float:
        """Numbers of 32 bits that a task stores."""
        if name == "next":
            return numbers_in(self.model.backbone)
        return numbers_in(self.model.task(name)) + self.extra_parameters(name)


def numbers_in(module: nn.Module) -> int:
    """How many numbers a module stores; marks of true and false are none, nor is the text of a task."""
    stored = {key: value for key, value in module.state_dict().items() if key != "text"}
    return sum(value.numel() for value in stored.values() if value.is_floating_point())


def score(spec, metrics: dict[str, float]) -> float:
    """A task's metric on a scale on which differences are relative and more is better."""
    value = math.log(max(metrics[spec.metric], 1e-6))
    return value if higher_is_better(spec.metric) else -value


def batches_of(
    dataset: Dataset,
    examples: Examples,
    model: UserModel,
    seed: int | None,
    newest: int | None = None,
    most: int = 16_384,
) -> Iterator[ExampleBatch]:
    """Batches of at most `most` examples; newest: how many of the newest events are seen, as many as the backbone takes
    by default."""
    max_len = model.backbone.config.max_len if newest is None else newest
    for group in plan(examples, max_tokens=16_384, max_len=max_len, seed=seed):
        for rows in group.split(most):
            batch = make_batch(dataset, examples, rows, max_len)
            if newest is not None:  # what came before is not known, and so not ranked last
                batch = batch._replace(history=replace(batch.history, older=None))
            yield batch


def trainable_copy(backbone: Backbone) -> Backbone:
    """A frozen backbone's twin with parameters."""
    twin = Backbone(backbone.config)
    twin.load_state_dict(backbone.state_dict())
    return twin
