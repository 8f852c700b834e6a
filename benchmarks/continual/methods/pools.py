"""What the prompt pools from vision share: a user's query by the frozen backbone, and prompts of its own in front."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.continual.learner import Learner
from pcl_ext.batch import PackedBatch
from pcl_ext.model import LayerPrefix
from pcl_ext.model.encoded import encode


class PoolLearner(Learner):
    """Every history sees a prefix of its own, `prompts` of its query: rows that run through the frozen layers."""

    @torch.no_grad()
    def query(self, history: PackedBatch) -> Tensor:
        """[B, D], the newest state of the frozen backbone without prompts."""
        return encode(self.model.backbone, history, every_state=False).newest

    def prompts(self, query: Tensor, name: str) -> Tensor:
        """query [B, D] -> [B, P, D]."""
        raise NotImplementedError

    def prefix(self, history: PackedBatch, name: str) -> LayerPrefix | None:
        if name == "next":
            return None
        rows = self.prompts(self.query(history), name)
        offsets = torch.arange(len(rows) + 1) * rows.shape[1]
        return self.model.backbone.prefix(rows.flatten(0, 1), offsets)
