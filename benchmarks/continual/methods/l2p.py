"""L2P (Wang et al., 2022): a shared pool of prompts; a user takes those whose keys match its query best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.continual.methods.pools import PoolLearner
from pcl_ext.data import ExampleBatch

POOL, TAKEN, LENGTH = 10, 4, 5


class L2p(PoolLearner):
    """The pool is trained by every task, so earlier ones may forget."""

    def __init__(self, model, world):
        super().__init__(model, world)
        dim = model.backbone.config.dim
        self.keys = nn.Parameter(torch.randn(POOL, dim) * dim**-0.5)
        self.pool = nn.Parameter(torch.randn(POOL, LENGTH, dim) * dim**-0.5)

    def trained(self) -> list[nn.Parameter]:
        return [self.keys, self.pool]

    def prompts(self, query: Tensor, name: str) -> Tensor:
        cosines = F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T
        self.match = cosines.topk(TAKEN, dim=1)
        return self.pool[self.match.indices].flatten(1, 2)

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        """Chosen keys are drawn to the queries that chose them."""
        return self.task_loss(batch, name) + self.world.setting.strength * (1 - self.match.values).mean()
