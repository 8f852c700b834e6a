"""CONURE (Yuan et al., 2021): a task keeps the largest of the free weights and freezes them; later ones read them."""

from __future__ import annotations

import torch

from benchmarks.continual.learner import Learner, View
from benchmarks.continual.methods.gates import HeldWeights


class Conure(Learner):
    """Everything of the backbone but the layers' matrices belongs to T1.

    owner  of each weight of a matrix: the number of the task that keeps it, from 1 up, 0 where it is free. What a task
           gives up is set to 0: there the next one starts.
    """

    adapts = True

    def __init__(self, model, world):
        super().__init__(model, world)
        named = dict(self.model.backbone.named_parameters())
        matrices = {n: p for n, p in named.items() if n.startswith("layers") and p.dim() == 2}
        self.owner = {n: torch.zeros_like(p, dtype=torch.int64) for n, p in matrices.items()}
        self.number = {"next": 1}
        self.hold(0)

    def first(self) -> None:
        self.prune(1)
        self.hold(1)
        self.fit_next(self.world.budget.retrain_epochs)

    def hold(self, moving: int) -> None:
        """Only the weights of one owner move (0: the free ones); with those of T1 the rest of the backbone does."""
        named, factors = dict(self.model.backbone.named_parameters()), {}
        for name, parameter in named.items():
            owned = self.owner[name] == moving if name in self.owner else torch.full_like(parameter, moving == 1)
            factors[name] = owned.to(parameter.dtype)
        self.held = HeldWeights(named, factors)

    def begin(self, name: str) -> None:
        self.number[name] = len(self.number) + 1
        self.hold(0)

    def end(self, name: str) -> None:
        self.prune(self.number[name])
        self.hold(self.number[name])
        self.fit(name, self.world.budget.retrain_epochs)

    @torch.no_grad()
    def prune(self, number: int) -> None:
        """The largest free weights of each matrix become the task's, the others 0."""
        for name, parameter in self.model.backbone.named_parameters():
            if name not in self.owner:
                continue
            free = self.owner[name] == 0
            size = torch.where(free, parameter.abs(), -1.0).flatten()
            kept = size.topk(round(self.world.setting.keep * int(free.sum()))).indices
            self.owner[name].view(-1)[kept] = number
            parameter[self.owner[name] == 0] = 0.0

    def view(self, name: str) -> View:
        """Weights of this and earlier tasks; of the task being learned the free ones too."""
        number, weights = self.number[name], {}
        learning = not self.model.task(name).closed
        for key, parameter in self.model.backbone.named_parameters():
            if key in self.owner:
                owner = self.owner[key]
                weights[key] = parameter * ((owner <= number) & ((owner > 0) | learning))
        return View(self.model.backbone, weights)

    def before_step(self) -> None:
        self.held.before()

    def after_step(self) -> None:
        self.held.after()

    def owned(self, name: str) -> int:
        """Weights that belong to a task."""
        return sum(int((owner == self.number[name]).sum()) for owner in self.owner.values())

    def extra_parameters(self, name: str) -> float:
        return self.owned(name)
