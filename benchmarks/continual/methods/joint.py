"""Joint multi-task training: one backbone, every task in every step. Shared bottom, and MMoE; pretrained, or from scratch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.continual.learner import Learner
from pcl_ext.data import ExampleBatch
from pcl_ext.model import Backbone, UserModel
from pcl_ext.model.backbone import NamedModules
from pcl_ext.train import NEXT, PretrainConfig, epoch_batches


class Joint(Learner):
    """Shared bottom. An epoch is as many steps as the task with the most batches has; the others start over."""

    joint = True
    adapts = True
    scratch = False

    def __init__(self, model, world):
        super().__init__(model, world)
        if self.scratch:
            self.model = UserModel(Backbone(model.backbone.config))
            self.model.backbone.trained_items.copy_(model.backbone.trained_items)
            self.model.add_task(world.dataset.task("next").spec, NEXT)

    def learn_all(self) -> None:
        """All tasks from start to end; each is charged its share of the time."""
        started, names = time.monotonic(), ["next", *self.world.tasks]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.world.seed)
            for name in self.world.tasks:
                self.start_task(name)
                self.begin(name)
                self.fit_head(name)
            config = self.world.learn_config()
            pretraining = PretrainConfig(epochs=config.epochs, patience=config.patience, seed=self.world.seed)
            self.next_batches, self.next_loss = self.next_problem(pretraining)
            self._train(names, self.batches, self.joint_loss, config)
        for name in names:
            self.model.freeze_task(name)
        self.seconds = dict.fromkeys(names, (time.monotonic() - started) / len(names))

    def batches(self, epoch: int) -> tuple[int, Iterator[dict[str, ExampleBatch]]]:
        """(steps, a batch of every task for each step)."""
        config, max_len = self.world.learn_config(), self.model.backbone.config.max_len

        def task_batches(name: str, epoch: int):
            if name == "next":
                return self.next_batches(epoch)
            return epoch_batches(self.world.dataset, self.world.train_examples(name), config, max_len, epoch, 0)

        def endless(name: str) -> Iterator[ExampleBatch]:
            again = epoch
            while True:
                yield from task_batches(name, again)[1]
                again += 1000  # another order

        names = ["next", *self.world.tasks]
        steps = max(task_batches(name, epoch)[0] for name in names)
        streams = {name: endless(name) for name in names}
        return steps, ({name: next(stream) for name, stream in streams.items()} for _ in range(steps))

    def joint_loss(self, batch: dict[str, ExampleBatch]) -> Tensor:
        """Sum of all tasks' losses."""
        losses = [self.next_loss(part) if name == "next" else self.loss(part, name) for name, part in batch.items()]
        return torch.stack(losses).sum()


class JointScratch(Joint):
    scratch = True


class Experts(nn.Module):
    """Small networks over the last states, starting as the identity; each task mixes them row by row."""

    def __init__(self, dim: int, count: int = 4):
        super().__init__()
        self.down, self.up = nn.Linear(dim, count * dim), nn.Parameter(torch.zeros(count, dim, dim))
        self.gates = NamedModules()
        self.count = count

    def forward(self, x: Tensor, name: str) -> Tensor:
        """x [T, D] -> [T, D]."""
        hidden = torch.nn.functional.gelu(self.down(x)).unflatten(1, (self.count, -1))
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
            self.experts.gates[name] = nn.Linear(dim, self.experts.count)

    def trained(self) -> list[nn.Parameter]:
        return [*super().trained(), *self.experts.parameters()]

    def view(self, name: str) -> MixedView:
        return MixedView(self.model.backbone, self.experts, name)

    def extra_parameters(self, name: str) -> float:
        return sum(p.numel() for p in self.experts.gates[name].parameters())


class MmoeScratch(Mmoe):
    scratch = True
