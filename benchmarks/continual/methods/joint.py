"""Joint training: one backbone, every task in every step. Shared bottom, and MMoE; pretrained, or from scratch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.continual.learner import Learner, numbers_in
from benchmarks.continual.union import Share, Union, UnionBatch
from pcl_ext.batch import PackedBatch
from pcl_ext.data import ExampleBatch
from pcl_ext.model import Backbone, Encoded, Task, UserModel
from pcl_ext.model.backbone import NamedModules
from pcl_ext.model.encoded import encode
from pcl_ext.model.layout import newest_rows
from pcl_ext.train import PretrainConfig

EXPERTS = 4


class Joint(Learner):
    """Shared bottom. A step has a batch of histories with the targets of every task in it, and one of T1.

    An epoch passes over the inputs of all tasks once; T1 has as many steps. Tasks are at their best at different
    epochs, and one epoch for all leaves some far from it: each task keeps its own best epoch, backbone and all; a
    pretrained T1 may keep its start.
    Training ends when no task has become better for `patience` epochs.
    """

    joint = True
    adapts = True

    def __init__(self, model, world):
        super().__init__(model, world)
        if self.scratch:
            self.model = UserModel(Backbone(model.backbone.config))
            self.model.backbone.trained_items.copy_(model.backbone.trained_items)
        self.best: dict[str, tuple[float, Any, dict[str, Tensor]]] = {}  # score, view and task's state at that epoch
        self.views: dict[str, Any] = {}  # after training
        self.improved = 0
        closed = model.task("next")
        self.model.tasks["next"] = Task(closed.spec, closed.config, self.model.backbone)  # its head learns on
        self.model.task("next").register_buffer("text", closed.text)
        if not self.scratch:
            self.model.task("next").load_state_dict(closed.state_dict())

    def learn_all(self) -> None:
        """All tasks from start to end; each is charged its share of the time."""
        started, names = time.process_time(), ["next", *self.world.tasks]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.world.seed)
            for name in self.world.tasks:
                self.start_task(name)
                self.fit_head(name)
            config = self.world.learn_config()
            pretraining = PretrainConfig(epochs=config.epochs, patience=config.patience, seed=self.world.seed)
            self.next_batches, self.next_loss = self.next_problem(pretraining)
            self.union = Union(self.world.dataset, {n: self.world.train_examples(n) for n in self.world.tasks})
            if not self.scratch:
                self.epoch_score(["next"])  # as it was pretrained, should no epoch be better
            self._train(names, self.batches, self.joint_loss, config)
        for name in names:
            _, self.views[name], state = self.best[name]
            self.model.task(name).load_state_dict(state)
            if not self.model.task(name).closed:
                self.model.task(name).close()
        self.seconds = dict.fromkeys(names, (time.process_time() - started) / len(names))

    def epoch_score(self, names: list[str]) -> float:
        """How many epochs, the start included where it was scored, have been the best so far of some of these tasks."""
        scores = {name: self.valid_score(name) for name in names}
        better = [name for name, value in scores.items() if name not in self.best or value > self.best[name][0]]
        for name in better:
            state = {key: value.clone() for key, value in self.model.task(name).state_dict().items()}
            self.best[name] = scores[name], deepcopy(self.live(name)), state
        self.improved += bool(better)
        return float(self.improved)

    def live(self, name: str) -> Any:
        """The backbone as a task reads it while training goes on."""
        return self.model.backbone

    def view(self, name: str) -> Any:
        return self.views[name] if name in self.views else self.live(name)

    def extra_parameters(self, name: str) -> float:
        return numbers_in(self.model.backbone)

    def batches(self, epoch: int) -> tuple[int, Iterator[tuple[UnionBatch, ExampleBatch]]]:
        """(steps, a batch of all tasks and one of T1 for each)."""
        config, max_len = self.world.learn_config(), self.model.backbone.config.max_len
        steps, batches = self.union.batches(config, max_len, epoch)
        return steps, zip(batches, self.endless(epoch))

    def endless(self, epoch: int) -> Iterator[ExampleBatch]:
        for again in count(epoch, 1000):  # another order each time
            yield from self.next_batches(again)[1]

    def task_groups(self, task: Task, factor: float) -> list[dict[str, Any]]:
        """With a weighted loss gradients are smaller, and so must be the eps to which Adam compares those of an item
        memory: at a tenth of the weight it would learn at a tenth of its rate."""
        weight = 1.0 if task.spec.name == "next" else self.world.setting.strength
        groups = super().task_groups(task, factor)
        return [group | {"eps": weight * group["eps"]} if "eps" in group else group for group in groups]

    def joint_loss(self, batch: tuple[UnionBatch, ExampleBatch]) -> Tensor:
        """T1's loss, and `strength` times the sum of the others.

        Few labels are soon known by heart, and from scratch six such losses keep T1 from being learned: mrr@5 .04 on
        valid users of online-retail, where a tenth of their sum leaves .18. Heads and memories do not notice: Adam's
        steps do not depend on a loss's scale, and `task_groups` scales the one eps that is no trifle.
        """
        union, following = batch
        states = self.states(union.history)
        losses = [self.share_loss(name, share, states) for name, share in union.shares.items()]
        return self.next_loss(following) + self.world.setting.strength * torch.stack(losses).sum()

    def states(self, history: PackedBatch) -> Encoded:
        """Histories as every task sees them."""
        return encode(self.model.backbone, history, every_state=True)

    def share_loss(self, name: str, share: Share, states: Encoded) -> Tensor:
        """A task's loss on its part of a batch."""
        task = self.model.task(name)
        output = task(self.own(name, states).select(share.rows), self.model.backbone.table)
        return task.loss(output, task.columns(share.target), share.target_row)

    def own(self, name: str, states: Encoded) -> Encoded:
        """The shared states as one task reads them."""
        return states


class JointScratch(Joint):
    scratch = True


class Experts(nn.Module):
    """Small networks over the last states, starting as the identity; each task mixes them row by row."""

    def __init__(self, dim: int):
        super().__init__()
        self.down, self.up = nn.Linear(dim, EXPERTS * dim), nn.Parameter(torch.zeros(EXPERTS, dim, dim))
        self.gates = NamedModules()

    def forward(self, x: Tensor, name: str) -> Tensor:
        """x [T, D] -> [T, D]."""
        hidden = torch.nn.functional.gelu(self.down(x)).unflatten(1, (EXPERTS, -1))
        weights = self.gates[name](x).softmax(1)
        return x + torch.einsum("tef,efd->td", hidden * weights[:, :, None], self.up)


class MixedView:
    """A backbone whose last states went through the experts as one task mixes them."""

    def __init__(self, backbone: Backbone, experts: Experts, name: str):
        self.backbone, self.experts, self.name = backbone, experts, name
        self.config, self.table = backbone.config, backbone.table

    def __call__(self, *inputs) -> list[Tensor]:
        states = self.backbone(*inputs)
        return [*states[:-1], self.experts(states[-1], self.name)]


class Mmoe(Joint):
    """Multi-gate mixture of experts (Ma et al., 2018) on top of the shared backbone."""

    def __init__(self, model, world):
        super().__init__(model, world)
        dim = model.backbone.config.dim
        self.experts = Experts(dim)
        for name in ("next", *world.tasks):
            self.experts.gates[name] = nn.Linear(dim, EXPERTS)

    def trained(self) -> list[nn.Parameter]:
        return [*super().trained(), *self.experts.parameters()]

    def live(self, name: str) -> MixedView:
        return MixedView(self.model.backbone, self.experts, name)

    def own(self, name: str, states: Encoded) -> Encoded:
        (piece,) = states.pieces
        mixed = self.experts(piece.states[-1], name)
        newest = torch.zeros_like(states.newest)
        filled = states.offsets.diff() > 0
        newest[filled] = mixed[newest_rows(states.offsets)]
        return replace(states, newest=newest, pieces=[replace(piece, states=[*piece.states[:-1], mixed], totals={})])

    def extra_parameters(self, name: str) -> float:
        shared = [*self.experts.down.parameters(), self.experts.up, *self.experts.gates[name].parameters()]
        return super().extra_parameters(name) + sum(p.numel() for p in shared)


class MmoeScratch(Mmoe):
    scratch = True
