"""Prompts: rows of a task among the embeddings of a history, in front of it, or in front of it in every layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.layout import LayerPrefix
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


class LayerPrompt(Memory):
    """What every layer reads in front of every history, learned for each layer by itself: keys and values, or what the
    two convolutions of a NextItNet block read (prefix tuning; Li and Liang, 2021). rows [num_layers, 2, P, D]."""

    def __init__(self, length: int, shape: BackboneConfig):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(shape.num_layers, 2, length, shape.dim) * 0.1)
        heads = (shape.num_heads, shape.dim // shape.num_heads)
        self.row_shape = heads if shape.kind == "transformer" else (shape.dim,)

    def layer_prefix(self) -> LayerPrefix | None:
        length = self.rows.shape[2]
        if not length:
            return None
        keys, values = self.rows.unflatten(3, self.row_shape).unbind(1)
        return LayerPrefix(list(keys), list(values), torch.arange(2, device=self.rows.device) * length)
