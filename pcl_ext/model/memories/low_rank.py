"""Low-rank prompts: the top layer as the task would have it, W + B A; the layers below are shared."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pcl_ext.model.backbone import Backbone, Layer, attend_newest, newest_rows
from pcl_ext.model.encoded import Encoded, newest_of
from pcl_ext.model.memories.base import Memory

_PARTS = ("qkv", "out", "ffn_in", "ffn_out")


class LowRankPrompts(Memory):
    """Each weight W of the top layer plus B A of a small rank (Hu et al., 2021); the newest state is computed with
    them. B starts at zero: the frozen backbone itself, bit for bit."""

    lower_states = True

    def __init__(self, backbone: Backbone, rank: int):
        super().__init__()
        self._shared = (backbone,)  # in a tuple: the backbone is no part of what the task stores
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in _PARTS:
            columns, rows = getattr(backbone.layers[-1], name).weight.shape
            self.down[name] = nn.Parameter(torch.randn(rank, rows) * rows**-0.5)
            self.up[name] = nn.Parameter(torch.zeros(columns, rank))

    def reread(self, encoded: Encoded) -> Encoded:
        backbone, layer, offsets = self._shared[0], self._layer(), encoded.offsets
        rows = encoded.rows(len(backbone.layers) - 1)
        keys, values = Layer.keys_values(layer, rows)
        newest = rows.index_select(0, newest_rows(offsets))
        attended = attend_newest(*Layer.queries_keys_values(layer, newest), offsets, keys, values)
        states = backbone.norm(Layer.finish(layer, newest, attended))
        return replace(encoded, newest=newest_of(states, offsets, every_state=False))

    def _layer(self) -> SimpleNamespace:
        """The top layer with this task's weights, as the methods of Layer read it."""
        top = self._shared[0].layers[-1]
        norms = {name: getattr(top, name) for name in ("heads", "norm_attention", "norm_ffn")}
        parts = {name: self._linear(name, getattr(top, name)) for name in _PARTS}
        return SimpleNamespace(**norms, **parts, training=False)

    def _linear(self, name: str, frozen: nn.Linear) -> SimpleNamespace:
        change: Tensor = self.up[name] @ self.down[name]
        return SimpleNamespace(weight=frozen.weight + change.to(frozen.weight), bias=frozen.bias)
