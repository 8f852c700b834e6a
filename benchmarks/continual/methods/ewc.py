"""EWC (Kirkpatrick et al., 2017): strength / 2 * sum F_i (w_i - w*_i)^2, F the Fisher information of earlier tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.continual.learner import Learner
from pcl_ext.data import ExampleBatch, make_batch

USERS = 400  # a task's Fisher information is measured on


class Ewc(Learner):
    """Fisher informations of all earlier tasks are summed; the anchor is where the last of them ended."""

    adapts = True

    def __init__(self, model, world):
        super().__init__(model, world)
        self.fisher = [torch.zeros_like(p) for p in self.trained()]
        self.anchor = [p.detach().clone() for p in self.trained()]

    def first(self) -> None:
        self.end("next")

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        return self.task_loss(batch, name) + self.anchoring()

    def anchoring(self) -> Tensor:
        """The penalty."""
        parts = zip(self.fisher, self.trained(), self.anchor, strict=True)
        return self.world.setting.strength / 2 * sum((f * (p - a).square()).sum() for f, p, a in parts)

    def end(self, name: str) -> None:
        """Diagonal of the empirical Fisher information: the mean over users of the squared gradient."""
        dataset, max_len = self.world.dataset, self.model.backbone.config.max_len
        examples = self.world.train_examples(name)
        chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.world.seed))[:USERS]
        self.eval()
        for user in chosen:
            loss = self.task_loss(make_batch(dataset, examples, user[None], max_len), name)
            for fisher, grad in zip(self.fisher, torch.autograd.grad(loss, self.trained(), allow_unused=True)):
                if grad is not None:
                    fisher += grad.square() / len(chosen)
        self.anchor = [p.detach().clone() for p in self.trained()]
