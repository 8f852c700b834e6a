"""Readouts of the frozen states as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.memories.base import Memory


class LastState(Memory):
    """Reads the newest state."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.num_features = config.dim

    def features(self, encoded: Encoded) -> Tensor:
        return encoded.newest


class MeanStates(Memory):
    """Reads the means over time of the embeddings and of every layer's states, and the history's length."""

    every_state = True

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.depths = range(config.num_layers + 1)
        self.num_features = len(self.depths) * config.dim + 1

    def features(self, encoded: Encoded) -> Tensor:
        return torch.cat([encoded.mean(depth) for depth in self.depths] + [encoded.log_lengths()], dim=1)
