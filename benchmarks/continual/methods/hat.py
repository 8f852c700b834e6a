"""HAT (Serra et al., 2018): gates sigmoid(s e) on units, hard in the end; what earlier tasks use moves no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.continual.learner import Learner, View
from benchmarks.continual.methods.gates import Gates, HeldWeights, freedom, gated, opening, widths
from pcl_ext.data import ExampleBatch

S_MAX = 400.0
CLAMP = 6.0
GATE_RATE = 3e-2


class Hat(Learner):
    """Gates are annealed from 1 / S_MAX to S_MAX in each epoch; T1's start open: the backbone is pretrained."""

    adapts = True

    def __init__(self, model, world):
        super().__init__(model, world)
        self.open: dict[str, nn.Parameter] = {}  # by unit, of the task being learned
        self.closed: dict[str, Gates] = {}
        self.past: Gates = {unit: torch.zeros(n) for unit, n in widths(model.backbone.config).items()}
        self.hold()

    def hold(self) -> None:
        """Weights keep what the earlier tasks use."""
        backbone = self.model.backbone
        self.held = HeldWeights(dict(backbone.named_parameters()), freedom(backbone, self.past))

    def first(self) -> None:
        self.begin("next")
        with torch.no_grad():
            for e in self.open.values():
                e.abs_()
        self.fit_next(self.world.budget.retrain_epochs)
        self.end("next")

    def begin(self, name: str) -> None:
        units, generator = widths(self.model.backbone.config), self.generator()
        self.open = {unit: nn.Parameter(torch.randn(n, generator=generator)) for unit, n in units.items()}

    def fit_head(self, name: str) -> None:
        """Features are standardised with all gates open: which of them stay closed is not known yet, and the deviation
        of a closed one is 0."""
        self.closed[name] = {unit: torch.ones_like(past) for unit, past in self.past.items()}
        super().fit_head(name)
        del self.closed[name]

    def groups(self) -> list[dict[str, Any]]:
        return [*super().groups(), {"params": list(self.open.values()), "lr": GATE_RATE, "weight_decay": 0.0}]

    def gates(self, name: str) -> Gates:
        if name in self.closed:
            return self.closed[name]
        s = opening(self.progress, S_MAX) if self.training else S_MAX
        return {unit: torch.sigmoid(s * e) for unit, e in self.open.items()}

    def view(self, name: str) -> View:
        return View(self.model.backbone, gated(self.model.backbone, self.gates(name)))

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        return self.task_loss(batch, name) + self.penalty(name)

    def penalty(self, name: str) -> Tensor:
        """Share of the units still free that the task takes."""
        gates = self.gates(name)
        taken = sum((a * (1 - self.past[unit])).sum() for unit, a in gates.items())
        free = sum((1 - past).sum() for past in self.past.values()).clamp_min(1e-6)
        return self.world.setting.strength * taken / free

    def before_step(self) -> None:
        s = opening(self.progress, S_MAX)
        for e in self.open.values():
            e.grad *= S_MAX / s * (torch.cosh((s * e.detach()).clamp(-50, 50)) + 1) / (torch.cosh(e.detach()) + 1)
        self.held.before()

    @torch.no_grad()
    def after_step(self) -> None:
        self.held.after()
        for e in self.open.values():
            e.clamp_(-CLAMP, CLAMP)

    @torch.no_grad()
    def end(self, name: str) -> None:
        self.eval()
        self.closed[name] = self.gates(name)
        self.open = {}
        self.past = {unit: torch.maximum(self.past[unit], a) for unit, a in self.closed[name].items()}
        self.hold()

    def extra_parameters(self, name: str) -> float:
        return sum(a.numel() for a in self.closed[name].values())
