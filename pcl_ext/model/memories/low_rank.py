"""Low-rank prompts: the top layer as the task would have it, W + B A; the layers below are shared."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from pcl_ext.model.backbone import Backbone, Layer
from pcl_ext.model.encoded import Encoded, newest_of
from pcl_ext.model.layout import Layout
from pcl_ext.model.memories.base import Memory

_PARTS = ("qkv", "out", "ffn_in", "ffn_out")


class LowRankPrompts(Memory):
    """Each weight W of the top layer plus B A of a small rank (Hu et al., 2021); the newest state is computed with
    them. B starts at zero: the frozen backbone itself, bit for bit. Needs layers of attention."""

    every_state = True

    def __init__(self, backbone: Backbone, rank: int):
        super().__init__()
        if backbone.config.kind != "transformer":
            raise ValueError(f"low_rank needs layers of attention, the backbone is a {backbone.config.kind}")
        self._shared = (backbone,)  # in a tuple: the backbone is no part of what the task stores
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name in _PARTS:
            columns, rows = getattr(backbone.layers[-1], name).weight.shape
            self.down[name] = nn.Parameter(torch.randn(rank, rows) * rows**-0.5)
            self.up[name] = nn.Parameter(torch.zeros(columns, rank))

    def reread(self, encoded: Encoded) -> Encoded:
        backbone, offsets = self._shared[0], encoded.offsets
        rows = encoded.rows(len(backbone.layers) - 1)
        layout = Layout.of(offsets, len(rows), on_host=encoded.on_host)
        states, _ = _with_weights(backbone.layers[-1], self._weights())(rows, layout, None, "newest")
        return replace(encoded, newest=newest_of(backbone.norm(states), offsets, encoded.on_host))

    def _weights(self) -> dict[str, Tensor]:
        """The top layer's weights as the task would have them, by part."""
        frozen = {name: getattr(self._shared[0].layers[-1], name).weight for name in _PARTS}
        changes = {name: (self.up[name] @ self.down[name]).to(frozen[name]) for name in _PARTS}
        return {name: frozen[name] + changes[name] for name in _PARTS}


def _with_weights(layer: Layer, weights: dict[str, Tensor]) -> Layer:
    """A layer of this call's own with these weights by part; all else is shared with `layer`.

    Nothing is written to `layer`, as torch.func.functional_call would for a moment: other threads may be reading it.
    """
    parts = [layer._modules.get(name) for name in weights]
    if type(layer).forward is not Layer.forward or any("forward" in part.__dict__ for part in (layer, *parts)):
        raise TypeError(
            f"low_rank changes weights of the top layer, which has a forward of its own ({type(layer).__name__}), or a "
            "part of it has: that would go on reading its own weights; checkpoint or compile the whole model instead"
        )
    changed = copy(layer)
    changed._modules = dict(layer._modules)
    for name, weight in weights.items():
        part = changed._modules[name] = copy(layer._modules[name])
        part._parameters = {key: value for key, value in part._parameters.items() if key != "weight"}
        part._buffers = part._buffers | {"weight": weight}
        if part.weight is not weight:
            raise TypeError(
                f"low_rank changes the weight of the top layer's {name!r}, which a {type(part).__name__} computes "
                "itself: merge what does so into the weight first"
            )
    return changed
