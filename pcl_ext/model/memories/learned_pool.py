"""Learned pooling: what a task looks for at every event, averaged over the history."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.memories.base import Memory


class LearnedPool(Memory):
    """Mean over time of gelu(W [embedding; state of layer 1] + b), `units` numbers; 0 for an empty history.

    While the task learns, each event is left out with probability `dropout`.
    """

    standardise = False
    every_state = True

    def __init__(self, config: BackboneConfig, units: int, dropout: float):
        super().__init__()
        self.num_features, self.dropout = units, dropout
        self.linear = nn.Linear(2 * config.dim, units)

    def features(self, encoded: Encoded) -> Tensor:
        total = 0.0
        for piece in encoded.pieces:
            units = F.gelu(self.linear(torch.cat([piece.states[0], piece.states[1]], dim=1)))
            kept = F.dropout(units.new_ones(len(units)), self.dropout, self.training)
            total = total + piece.pool(units, kept)
        return total / encoded.offsets.diff().clamp_min(1)[:, None].to(total.dtype)
