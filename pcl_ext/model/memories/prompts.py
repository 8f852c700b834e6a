"""Prompts: rows of a task among the embeddings of a history, or in front of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcl_ext.model.memories.base import Memory


class TailPrompt(Memory):
    """Position-wise prompt (Eq. 1). Starts at zero: the frozen backbone itself."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(length, dim))

    def tail(self) -> Tensor:
        return self.rows


class PrefixPrompt(Memory):
    """Learned tokens in front of every history."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, dim) * dim**-0.5)

    def prefix(self) -> Tensor:
        return self.rows
