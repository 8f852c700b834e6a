"""What one task stores: small modules under one interface."""

from __future__ import annotations

from torch import Tensor, nn

from pcl_ext.model.encoded import Encoded
from pcl_ext.model.layout import LayerPrefix


class Memory(nn.Module):
    """One part of what a task stores. Each method may answer None or 0: "not my business"."""

    num_features = 0
    standardise = True  # whether the head scales these features to mean 0, deviation 1 before the task learns
    every_state = False  # whether it reads the states of all rows, not the newest ones alone

    def tail(self) -> Tensor | None:
        """[P, D], added to the P newest embeddings of a history, row P - 1 to the newest."""
        return None

    def prefix(self) -> Tensor | None:
        """[P, D], rows in front of a history."""
        return None

    def layer_prefix(self) -> LayerPrefix | None:
        """What every layer reads in front of a history, where that is learned itself."""
        return None

    def reread(self, encoded: Encoded) -> Encoded | None:
        """The histories as the task's readouts shall see them, where the memory changes that."""
        return None

    def features(self, encoded: Encoded) -> Tensor | None:
        """[B, num_features], what the head reads."""
        return None
