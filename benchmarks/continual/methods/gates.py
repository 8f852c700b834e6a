"""Gates on the units of a backbone, as weights: what HAT and TERACON share.

Units are the channels of the residual stream (one gate for all layers, for a unit that is closed must stay 0 from the
embedding to the readout), and in each layer those of the attention heads and of the feed-forward layer. All are linear
in what they gate, so gates go into the weights, and the backbone's own fused layers run as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcl_ext.model import Backbone, BackboneConfig

Gates = dict[str, Tensor]  # "stream" [D], and of each layer i "heads.i" [D] and "ffn.i" [F]


def opening(progress: float, s_max: float) -> float:
    """s of the gates sigmoid(s e), annealed within an epoch; progress 0..1."""
    return 1 / s_max + (s_max - 1 / s_max) * progress


def widths(config: BackboneConfig) -> dict[str, int]:
    """Units by name."""
    layers = range(config.num_layers)
    return (
        {"stream": config.dim}
        | {f"heads.{i}": config.dim for i in layers}
        | {f"ffn.{i}": config.ffn_dim for i in layers}
    )


def ends(name: str, gates: Gates) -> tuple[Tensor, Tensor | None]:
    """The gates of what a parameter writes, shaped to it, and of what it reads, None for a bias or a table."""
    stream, part = gates["stream"], name.split(".")
    if part[0] != "layers":
        return stream, None
    heads, ffn = gates[f"heads.{part[1]}"], gates[f"ffn.{part[1]}"]
    to, source = {
        "qkv": (torch.cat([heads] * 3), stream),
        "out": (stream, heads),
        "ffn_in": (ffn, stream),
        "ffn_out": (stream, ffn),
    }.get(part[2], (stream, None))
    return (to[:, None], source[None, :]) if part[3] == "weight" and source is not None else (to, None)


def gated(backbone: Backbone, gates: Gates) -> dict[str, Tensor]:
    """The backbone's weights with its gates in them."""
    weights = {}
    for name, parameter in backbone.named_parameters():
        kind = name.split(".")[2] if name.startswith("layers") else ""
        if kind == "ffn_in":  # its units are gated after the nonlinearity, by what reads them
            continue
        to, source = ends(name, gates)
        weights[name] = parameter * to
        if kind == "ffn_out" and source is not None:
            weights[name] = weights[name] * source
    return weights


def freedom(backbone: Backbone, past: Gates) -> dict[str, Tensor]:
    """1 - min(past gates of both ends): how far each weight may move, 0 where an earlier task needs it in full."""
    factors = {}
    for name, parameter in backbone.named_parameters():
        to, source = ends(name, past)
        used = to if source is None else torch.minimum(to, source)
        factors[name] = (1 - used).expand_as(parameter)
    return factors


class HeldWeights:
    """Scales every move of some parameters after a step; a factor of 0 leaves the very bits.

    Adam divides by the size of a gradient, so that scaling gradients would not hold anything back: the move is scaled.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], factors: dict[str, Tensor]):
        self.parts = [(parameters[name], factor) for name, factor in factors.items()]

    @torch.no_grad()
    def before(self) -> None:
        self.kept = [p.detach().clone() for p, _ in self.parts]

    @torch.no_grad()
    def after(self) -> None:
        for (parameter, factor), kept in zip(self.parts, self.kept, strict=True):
            parameter.copy_(torch.lerp(kept, parameter, factor))
