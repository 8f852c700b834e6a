"""The shared encoder: a causal pre-norm Transformer on packed rows, no padded tensor anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext import ops
from pcl_ext.batch import PackedBatch
from pcl_ext.model.config import BackboneConfig


@dataclass(frozen=True)
class LayerPrefix:
    """Rows that histories may attend to, as the keys and values of every layer.

    keys, values  num_layers tensors [M, H, d]
    offsets       [R + 1] int64, first row of each prefix
    index         [B] int64, the prefix of each history, -1 none; may be None when R is 1 or B
    """

    keys: list[Tensor]
    values: list[Tensor]
    offsets: Tensor
    index: Tensor | None = None


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the rows it reads."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.heads = (3, config.num_heads, config.dim // config.num_heads)
        self.norm_attention = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm_ffn = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> x [T, D] and this layer's keys and values [T, H, d]."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(1, self.heads).unbind(1)
        x = x + self.dropout(self.out(attend(q, k, v).flatten(1)))
        hidden = F.gelu(self.ffn_in(self.norm_ffn(x)))
        return x + self.dropout(self.ffn_out(hidden)), k, v


class Backbone(nn.Module):
    """Item and position embeddings and `num_layers` causal layers.

    Positions count from the history's end (newest event 0), as prompts do (method.md, Eq. 1).
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.randn(config.num_items + 1, config.dim) * config.dim**-0.5)
        self.position = nn.Parameter(torch.randn(config.max_len, config.dim) * 0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("trained_items", torch.zeros(config.num_items + 1, dtype=torch.bool))

    def embed(self, batch: PackedBatch, prompt: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Rows [T, D] of a batch; prompt [K, P, D] is added to the newest rows, index [B] chooses (-1 none)."""
        rows = ops.embed(batch.items, batch.offsets, self.table, self.position, prompt, index)
        return self.dropout(rows)

    def run(
        self, x: Tensor, offsets: Tensor, plan: ops.AttentionPlan | None = None, prefix: LayerPrefix | None = None
    ) -> tuple[list[Tensor], LayerPrefix]:
        """All layers over embedded rows.

        x [T, D], offsets [B + 1] -> states (the rows as they came in, then each layer's; the last one normalised) and
        the keys and values of these rows, to serve as the prefix of others.
        """
        if plan is None:
            plan = ops.attention_plan(offsets, *((prefix.offsets, prefix.index) if prefix else ()))
        states, keys, values = [x], [], []
        for depth, layer in enumerate(self.layers):
            shared = (prefix.keys[depth], prefix.values[depth], prefix.offsets, prefix.index) if prefix else ()

            def attend(q: Tensor, k: Tensor, v: Tensor, shared=shared) -> Tensor:
                return ops.prompt_attention(q, k, v, offsets, *shared, plan=plan)

            x, k, v = layer(x, attend)
            states.append(x)
            keys.append(k)
            values.append(v)
        states[-1] = self.norm(x)
        return states, LayerPrefix(keys, values, offsets)

    def prefix(self, rows: Tensor, offsets: Tensor, index: Tensor | None = None) -> LayerPrefix:
        """Keys and values of prompt rows [M, D] placed in front of histories.

        Under a causal mask they do not depend on the user: once per task, not once per user.
        """
        return replace(self.run(rows, offsets)[1], index=index)

    def forward(
        self,
        batch: PackedBatch,
        prompt: Tensor | None = None,
        prompt_index: Tensor | None = None,
        prefix: LayerPrefix | None = None,
    ) -> list[Tensor]:
        """States of every layer, num_layers + 1 tensors [T, D]; the last one is normalised."""
        rows = self.embed(batch, prompt, prompt_index)
        return self.run(rows, batch.offsets, None if prefix else batch.plan, prefix)[0]


def freeze(module: nn.Module) -> None:
    """Turn every parameter below `module` into a buffer of the same name: no optimiser sees it, nothing trains it."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            tensor = None if parameter is None else parameter.detach().clone()
            part.register_buffer(name, tensor)
    module.eval()


class NamedModules(nn.ModuleDict):
    """A ModuleDict that takes any name: a task may be called "items" or "train", as methods of a module are."""

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module
