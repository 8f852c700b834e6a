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
        self.heads = (config.num_heads, config.dim // config.num_heads)
        self.norm_attention = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm_ffn = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, D] -> what its rows ask, and what they answer: three tensors [T, H, d]."""
        rows = _normed_linear(x, self.norm_attention, self.qkv.weight, self.qkv.bias)
        return rows.unflatten(1, (3, *self.heads)).unbind(1)

    def keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, D] -> keys and values alone."""
        dim = x.shape[1]
        rows = _normed_linear(x, self.norm_attention, self.qkv.weight[dim:], self.qkv.bias[dim:])
        return rows.unflatten(1, (2, *self.heads)).unbind(1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [T, D] and what its rows found [T, H, d] -> the layer's output [T, D]."""
        attended, norm = attended.flatten(1), self.norm_ffn
        if self.training and self.dropout.p:
            x = x + self.dropout(self.out(attended))
            return x + self.dropout(self.ffn_out(F.gelu(self.ffn_in(norm(x)))))
        x = ops.linear(attended, self.out.weight, self.out.bias, residual=x)
        weights = (self.ffn_in.weight, self.ffn_in.bias, self.ffn_out.weight, self.ffn_out.bias)
        return ops.feed_forward(x, (norm.weight, norm.bias), *weights, eps=norm.eps)


def _normed_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, norm=(norm.weight, norm.bias), eps=norm.eps)


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

    def embed(
        self,
        items: Tensor,
        offsets: Tensor,
        prompt: Tensor | None = None,
        index: Tensor | None = None,
        *,
        from_end: int = 0,
    ) -> Tensor:
        """Rows [T, D] of items [T] by offsets [B + 1], the newest one from_end steps before its history's end.

        prompt [K, P, D] is added to the newest rows, index [B] chooses (-1 none).
        """
        return self.dropout(ops.embed(items, offsets, self.table, self.position[from_end:], prompt, index))

    def run(
        self,
        x: Tensor,
        offsets: Tensor,
        plan: ops.AttentionPlan | None = None,
        prefix: LayerPrefix | None = None,
        read: str = "every",
    ) -> tuple[list[Tensor], LayerPrefix]:
        """All layers over embedded rows.

        x [T, D], offsets [B + 1] -> states (the rows as they came in, then each layer's; the last one normalised) and
        the keys and values of these rows, to serve as the prefix of others. read says whose last state is wanted:
        "every" row's; the "newest" of each history that is not empty, [m, D] for m such histories; or "none", [0, D].
        """
        if plan is None:
            plan = ops.attention_plan(offsets, *((prefix.offsets, prefix.index) if prefix else ()))
        states, keys, values = [x], [], []
        for depth, layer in enumerate(self.layers):
            shared = (prefix.keys[depth], prefix.values[depth], prefix.offsets, prefix.index) if prefix else ()
            last = depth == len(self.layers) - 1
            if last and read == "none":
                k, v = layer.keys_values(x)
                x = x[:0]
            elif last and read == "newest" and not prefix:
                k, v = layer.keys_values(x)
                x = x.index_select(0, newest_rows(offsets))
                x = layer.finish(x, attend_newest(*layer.queries_keys_values(x), offsets, k, v))
            else:
                q, k, v = layer.queries_keys_values(x)
                attended = ops.prompt_attention(q, k, v, offsets, *shared, plan=plan)
                if last and read == "newest":
                    newest = newest_rows(offsets)
                    x, attended = x.index_select(0, newest), attended.index_select(0, newest)
                x = layer.finish(x, attended)
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
        read: str = "every",
    ) -> list[Tensor]:
        """States of every layer, num_layers + 1 tensors [T, D]; the last one is normalised, of the rows `run` says."""
        rows = self.embed(batch.items, batch.offsets, prompt, prompt_index)
        return self.run(rows, batch.offsets, None if prefix else batch.plan, prefix, read)[0]


def newest_rows(offsets: Tensor) -> Tensor:
    """offsets [B + 1] -> [m] int64, the newest row of each history that is not empty."""
    return offsets[1:][offsets.diff() > 0] - 1


def attend_newest(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, all_k: Tensor, all_v: Tensor) -> Tensor:
    """The newest rows q, k, v [m, H, d] of the histories, each attending to its own history all_k, all_v [T, H, d].

    What lies before a newest row is its prefix; the newest rows in between are prefixes that nobody sees.
    """
    ends = newest_rows(offsets)
    prefix_offsets = torch.stack([ends, ends + 1], 1).flatten()
    own = torch.arange(len(ends) + 1, device=ends.device)
    return ops.prompt_attention(q, k, v, own, all_k, all_v, torch.cat([own[:1], prefix_offsets]), 2 * own[:-1])


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
