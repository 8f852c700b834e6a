"""Piggyback (Mallya et al., 2018): a learned binary mask per task on the layers' frozen weights, 1 bit a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.continual.learner import Learner, View

START, THRESHOLD = 1e-2, 5e-3


class Binary(torch.autograd.Function):
    """1 above the threshold, else 0; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, real: Tensor) -> Tensor:
        return (real > THRESHOLD).to(real.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Piggyback(Learner):
    def __init__(self, model, world):
        super().__init__(model, world)
        self.real: dict[str, nn.Parameter] = {}  # by weight, of the task being learned
        self.masks: dict[str, dict[str, Tensor]] = {}  # bool, by task and weight

    def matrices(self) -> dict[str, Tensor]:
        """The weights that are masked: the layers' matrices."""
        state = self.model.backbone.state_dict()
        return {n: w for n, w in state.items() if n.startswith("layers") and w.dim() == 2}

    def begin(self, name: str) -> None:
        self.real = {n: nn.Parameter(torch.full_like(w, START)) for n, w in self.matrices().items()}

    def trained(self) -> list[nn.Parameter]:
        return list(self.real.values())

    def view(self, name: str):
        if name == "next":
            return self.model.backbone
        masks = self.masks.get(name) or {n: Binary.apply(real) for n, real in self.real.items()}
        return View(self.model.backbone, {n: w * masks[n] for n, w in self.matrices().items()})

    def end(self, name: str) -> None:
        self.masks[name] = {n: real.detach() > THRESHOLD for n, real in self.real.items()}
        self.real = {}

    def extra_parameters(self, name: str) -> float:
        return sum(mask.numel() for mask in self.masks[name].values()) / 32
