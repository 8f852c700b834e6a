"""PeterRec (Yuan et al., 2020): a frozen backbone with patches x + W_up gelu(W_down x), D / 4 wide, in every block."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.continual.learner import Learner, numbers_in
from pcl_ext.model import Backbone, freeze
from pcl_ext.model.backbone import NamedModules


class Patch(nn.Module):
    """Starts at zero: the backbone itself."""

    def __init__(self, dim: int):
        super().__init__()
        self.down, self.up = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class PatchedLayer(nn.Module):
    """A frozen layer whose output goes through a patch."""

    def __init__(self, layer: nn.Module, patch: Patch):
        super().__init__()
        self.layer, self.patch = layer, patch

    def forward(self, *rows):
        output, kept = self.layer(*rows)
        return self.patch(output), kept


def patched(backbone: Backbone, patches: nn.ModuleList) -> Backbone:
    """A backbone that shares every tensor with another one, and has patches behind its layers."""
    twin = copy.copy(backbone)
    twin._modules = dict(backbone._modules)
    twin.layers = nn.ModuleList(PatchedLayer(layer, patch) for layer, patch in zip(backbone.layers, patches))
    return twin.eval()


class PeterRec(Learner):
    def __init__(self, model, world):
        super().__init__(model, world)
        self.patches = NamedModules()

    def begin(self, name: str) -> None:
        config = self.model.backbone.config
        self.patches[name] = nn.ModuleList(Patch(config.dim) for _ in range(config.num_layers))

    def trained(self) -> list[nn.Parameter]:
        return list(self.patches[self.model.task_names[-1]].parameters())

    def view(self, name: str) -> Backbone:
        return patched(self.model.backbone, self.patches[name]) if name in self.patches else self.model.backbone

    def end(self, name: str) -> None:
        freeze(self.patches[name])

    def extra_parameters(self, name: str) -> float:
        return numbers_in(self.patches[name])
