"""The shared encoder: a causal pre-norm Transformer on packed rows, no padded tensor anywhere."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext import ops
from pcl_ext.batch import PackedBatch
from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.conv_layer import ConvLayer
from pcl_ext.model.dropout import Dropout
from pcl_ext.model.layout import LayerPrefix, Layout
from pcl_ext.model.plain_part import does_more
from pcl_ext.ops import direct

PARTS = {  # of a Layer: each a weight and a bias
    "norm_attention": nn.LayerNorm,
    "qkv": nn.Linear,
    "out": nn.Linear,
    "norm_ffn": nn.LayerNorm,
    "ffn_in": nn.Linear,
    "ffn_out": nn.Linear,
}


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the rows it reads."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.rotary = config.rotary
        self.heads = (config.num_heads, config.dim // config.num_heads)
        self.norm_attention = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm_ffn = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = Dropout(config.dropout)
        self.shapes = [tuple(tensor.shape) for name in PARTS for tensor in self._modules[name].parameters()]

    def _weights(self) -> list[tuple[Tensor, Tensor]] | None:
        """Weight and bias of each of PARTS; None where a part does more than they say, and so has to be called.

        `part.weight` is looked for in many places, which a small request feels."""
        pairs, compiling = [], torch.compiler.is_compiling()
        for name, kind in PARTS.items():
            part = self._modules[name]
            if does_more(part, kind):
                return None
            own = part._parameters or part._buffers
            if compiling or "weight" not in own or "bias" not in own:  # a parametrisation computes them, for one
                pairs.append((part.weight, part.bias))
            else:
                pairs.append((own["weight"], own["bias"]))
        return pairs

    def forward(
        self, x: Tensor, layout: Layout, before: tuple[Tensor, Tensor] | None, read: str
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [T, D] -> the output of the rows that are read, as `Backbone.run` says, and keys and values of all.

        before  keys and values [M, H, d] of the prefix
        """
        weights = self._weights()
        plain = weights and direct.takes(x, chain.from_iterable(weights), self.shapes, before or ())
        run = direct if plain else ops
        if read == "every":
            q, k, v = self._project(run, x, weights, 0, 3)
        else:
            k, v = self._project(run, x, weights, 1, 3)
        k = layout.turn(k) if self.rotary else k
        if read == "none":
            return x[:0], (k, v)
        if read == "newest":
            x = x.index_select(0, layout.newest)
            (q,) = self._project(run, x, weights, 0, 1)
            q = layout.turn(q, layout.newest) if self.rotary else q
            attended = run.newest_attention(q, k, v, layout.offsets, *layout.prefixed(before), plan=layout.plan)
        else:
            q = layout.turn(q) if self.rotary else q
            attended = run.prompt_attention(q, k, v, layout.offsets, *layout.prefixed(before), plan=layout.plan)
        return self._finish(run, x, attended.flatten(1), weights), (k, v)

    def _project(self, run: ModuleType, x: Tensor, weights: list | None, first: int, last: int) -> tuple[Tensor, ...]:
        """x [T, D] -> the queries (0), keys (1) and values (2) of its rows from first up to last, [T, H, d] each."""
        dim = x.shape[1]
        if weights is None:
            rows = self.qkv(self.norm_attention(x))[:, first * dim : last * dim]
        else:
            norm, (weight, bias) = weights[:2]
            if last - first < 3:
                weight, bias = weight[first * dim : last * dim], bias[first * dim : last * dim]
            rows = run.linear(x, weight, bias, norm=norm, eps=self._modules["norm_attention"].eps)
        if last - first == 1:
            return (rows.view(rows.shape[0], *self.heads),)
        return rows.view(rows.shape[0], last - first, *self.heads).unbind(1)

    def _finish(self, run: ModuleType, x: Tensor, attended: Tensor, weights: list | None) -> Tensor:
        """x [T, D] and what its rows found [T, D] -> the layer's output [T, D]."""
        if weights is None or (self.training and self.dropout.p):
            x = x + self.dropout(self.out(attended))
            return x + self.dropout(self.ffn_out(F.gelu(self.ffn_in(self.norm_ffn(x)))))
        _, _, out, norm, ffn_in, ffn_out = weights
        x = run.linear(attended, *out, residual=x)
        return run.feed_forward(x, norm, *ffn_in, *ffn_out, eps=self._modules["norm_ffn"].eps)


class Backbone(nn.Module):
    """Item embeddings and `num_layers` causal layers: attention, or convolutions (`BackboneConfig.kind`).

    Learned positions count from the history's end (newest event 0), as prompts do (Eq. 1); rotary ones from its first
    row, after those of its prefix, and only their differences matter.

    trained_items  [V + 1] bool, which items it was trained on
    """

    trained_items: Tensor

    def __init__(self, config: BackboneConfig):
        super().__init__()
        if not isinstance(config, BackboneConfig):
            raise TypeError(f"config must be a BackboneConfig, got {type(config).__name__}")
        self.config = config
        self.table = nn.Parameter(torch.randn(config.num_items + 1, config.dim) * config.dim**-0.5)
        if config.counts_from_end:
            self.position = nn.Parameter(torch.randn(config.max_len, config.dim) * 0.02)
        self.layers = nn.ModuleList(
            Layer(config) if config.kind == "transformer" else ConvLayer(config, depth)
            for depth in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.register_buffer("trained_items", torch.zeros(config.num_items + 1, dtype=torch.bool))

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module.train, but frozen it stays in evaluation mode: no dropout, whoever asks."""
        return super().train(mode and not is_frozen(self))

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
        position = self.position if self.config.counts_from_end else None
        if from_end and position is not None:
            position = position[from_end:]
        return self.dropout(ops.embed(items, offsets, self.table, position, prompt, index))

    def run(
        self,
        x: Tensor,
        offsets: Tensor,
        plan: ops.AttentionPlan | None = None,
        prefix: LayerPrefix | None = None,
        read: str = "every",
        on_host: Tensor | None = None,
    ) -> tuple[list[Tensor], LayerPrefix]:
        """All layers over embedded rows.

        x [T, D], offsets [B + 1] -> states (the rows as they came in, then each layer's; the last one normalised) and
        the keys and values of these rows, to serve as the prefix of others. read says whose last state is wanted:
        "every" row's; the "newest" of each history that is not empty, [m, D] for m such histories; or "none", [0, D].
        on_host are the lengths [B] on the CPU: with them nothing is read from a GPU.
        """
        layout = Layout.of(offsets, len(x), plan, prefix, on_host)
        states, keys, values, layers = [x], [], [], self.layers
        top = len(layers) - 1
        for depth, layer in enumerate(layers):
            before = (prefix.keys[depth], prefix.values[depth]) if prefix else None
            x, (k, v) = layer(x, layout, before, read if depth == top else "every")
            states.append(x)
            keys.append(k)
            values.append(v)
        states[-1] = self.norm(x)
        return states, LayerPrefix(keys, values, offsets)

    def prefix(self, rows: Tensor, offsets: Tensor) -> LayerPrefix:
        """Keys and values of prompt rows [M, D] placed in front of histories.

        Under a causal mask they do not depend on the user: once per task, not once per user.
        """
        return self.run(rows, offsets)[1]

    def check_batch(self, batch: PackedBatch) -> None:
        """TypeError for what is no batch; ValueError for one of another device, a history longer than max_len, and on
        the CPU for an older id that is none. The batch knows its lengths: nothing is read from a GPU."""
        if not isinstance(batch, PackedBatch):
            kind = type(batch).__name__
            raise TypeError(f"batch must be a PackedBatch, say of PackedBatch.from_lists, got {kind}")
        if batch.items.device != (device := self.table.device):
            raise ValueError(
                f"batch must be where the model is, on {device}, got {batch.items.device}; batch.to({str(device)!r})"
            )
        older, known, most = batch.older, self.config.num_items, self.config.max_len
        if older is not None and older.items.is_cpu and not torch.compiler.is_compiling():
            if len(older.items) and (largest := int(older.items.max())) > known:
                raise ValueError(
                    f"items must be ids in 1..{known}, got {largest} among what is older than the newest max_len; "
                    f"PackedBatch.from_lists(..., num_items={known}) drops unknown ids"
                )
        if batch.max_seqlen > most:
            raise ValueError(
                f"histories must be at most max_len = {most} long, got one of {batch.max_seqlen} (history "
                f"{int(batch.on_host.argmax())}); PackedBatch.from_lists(..., max_len={most}) reads the newest events"
            )

    def forward(
        self,
        batch: PackedBatch,
        prompt: Tensor | None = None,
        prompt_index: Tensor | None = None,
        prefix: LayerPrefix | None = None,
        read: str = "every",
    ) -> list[Tensor]:
        """States of every layer, num_layers + 1 tensors [T, D]; the last one is normalised, of the rows `run` says."""
        self.check_batch(batch)
        rows = self.embed(batch.items, batch.offsets, prompt, prompt_index)
        return self.run(rows, batch.offsets, None if prefix else batch.plan, prefix, read, batch.on_host)[0]

    if TYPE_CHECKING:  # of nn.Module it returns Any
        __call__ = forward


def freeze(module: nn.Module) -> None:
    """Turn every parameter below `module` into a buffer of the same name: no optimiser sees it, nothing trains it."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            with torch.inference_mode(False):  # what learns beside it may need it for its gradient
                tensor = None if parameter is None else parameter.detach().clone()
            part.register_buffer(name, tensor)
    module.eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter is left below `module`."""
    return next(module.parameters(), None) is None


class NamedModules(nn.ModuleDict):
    """A ModuleDict that takes any name: a task may be called "items" or "training", as attributes of a module are.

    Such a module lies under ":items", and is `tasks.:items` in names of parameters; as a mapping it has its own name.
    """

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(_attribute(name), module)

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(_attribute(name))

    def __delitem__(self, name: str) -> None:
        super().__delitem__(_attribute(name))

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and super().__contains__(_attribute(name))

    def get(self, name: str) -> nn.Module | None:
        """The module of this name, None where there is none."""
        return self._modules.get(_attribute(name)) if isinstance(name, str) else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> KeysView[str]:
        return {key.removeprefix(":"): None for key in self._modules}.keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return {key.removeprefix(":"): module for key, module in self._modules.items()}.items()


_TAKEN = frozenset(dir(NamedModules()))


def _attribute(name: str) -> str:
    """What a module of this name is called among the attributes of its parent."""
    return f":{name}" if name in _TAKEN or name.startswith("_") else name
