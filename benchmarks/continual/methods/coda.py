"""CODA-Prompt (Smith et al., 2023): a prompt is a sum of components, weighted by how a query meets their keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.continual.methods.pools import PoolLearner
from pcl_ext.data import ExampleBatch

COMPONENTS, LENGTH = 4, 8  # new ones of a task, rows of a prompt


class Coda(PoolLearner):
    """Every task adds components; those of earlier tasks are read, never written.

    The task is known, so that a task reads the components there were when it was learned.
    """

    def __init__(self, model, world):
        super().__init__(model, world)
        self.parts: dict[str, int] = {}
        self.keys, self.attention, self.rows = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()

    def begin(self, name: str) -> None:
        dim, generator = self.model.backbone.config.dim, self.generator()
        for group, shape in ((self.keys, (dim,)), (self.attention, (dim,)), (self.rows, (LENGTH, dim))):
            old = torch.cat([part.flatten(1) for part in group]) if len(group) else torch.zeros(0, math.prod(shape))
            group.append(nn.Parameter(apart(old, generator).view(COMPONENTS, *shape)))
        self.parts[name] = len(self.keys)

    def trained(self) -> list[nn.Parameter]:
        return [self.keys[-1], self.attention[-1], self.rows[-1]]

    def end(self, name: str) -> None:
        for parameter in self.trained():
            parameter.requires_grad_(False)

    def prompts(self, query: Tensor, name: str) -> Tensor:
        """query [B, D] -> [B, LENGTH, D]."""
        count = self.parts[name]
        keys, attention, rows = (torch.cat(list(part[:count])) for part in (self.keys, self.attention, self.rows))
        attended = F.normalize(query[:, None] * attention, dim=2)
        weights = torch.einsum("bmd,md->bm", attended, F.normalize(keys, dim=1))
        return torch.einsum("bm,mld->bld", weights, rows)

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        groups = (torch.cat(list(part)).flatten(1) for part in (self.keys, self.attention, self.rows))
        return self.task_loss(batch, name) + self.world.setting.strength * sum(map(overlap, groups))

    def extra_parameters(self, name: str) -> float:
        return sum(p.numel() for p in (self.keys[0], self.attention[0], self.rows[0]))


@torch.no_grad()
def apart(old: Tensor, generator: torch.Generator) -> Tensor:
    """[COMPONENTS, F] orthonormal rows, orthogonal to those of old [M, F]; ValueError where there is no room."""
    if len(old) + COMPONENTS > old.shape[1]:
        room = old.shape[1] // COMPONENTS
        raise ValueError(
            f"components of width {old.shape[1]} are orthogonal for {room} tasks at most; widen the backbone"
        )
    rows, basis = torch.randn(COMPONENTS, old.shape[1], generator=generator), torch.linalg.qr(old.T).Q
    return torch.linalg.qr((rows - rows @ basis @ basis.T).T).Q.T


def overlap(rows: Tensor) -> Tensor:
    """How far rows [M, F] are from orthonormal."""
    return (rows @ rows.T - torch.eye(len(rows))).square().mean()
