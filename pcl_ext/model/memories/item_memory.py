"""Item memory: a few numbers of the task's own for every item, pooled over the history."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.encoded import Encoded, pool
from pcl_ext.model.memories.base import Memory


class ItemMemory(Memory):
    """A table of the task's own, [V + 1, width], summed over the history and divided by sqrt(n): memory by item.

    While the task learns, each event is left out with probability `dropout`: the bag of items must not be learned by
    heart.
    """

    standardise = False

    def __init__(self, config: BackboneConfig, width: int, dropout: float):
        super().__init__()
        self.num_features, self.dropout = width, dropout
        self.table = nn.Parameter(torch.randn(config.num_items + 1, width) * 0.1)

    def features(self, encoded: Encoded) -> Tensor:
        scale = encoded.offsets.diff().clamp_min(1).to(self.table.dtype).rsqrt()
        weights = F.dropout(scale[encoded.users()], self.dropout, self.training)
        return pool(self.table, encoded.items, encoded.offsets, weights)
