"""The user model in plain PyTorch on padded histories, all together or in length buckets: how it is written elsewhere.

Also what bench_encode.py and bench_train_step.py share: users, models, and how right a result must be.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from measure import PRODUCT_GFLOP, Report, lengths_of, matrix_product, medians_ms, to_offsets
from torch import Tensor

from pcl_ext import BackboneConfig, MemoryConfig, TaskSpec, UserModel, ops
from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone

ITEMS, CLASSES, PROMPTS, MAX_LEN = 4000, 5, 20, 200
BUCKETS = [8, 16, 32]
TASKS = {  # what the head reads: the newest state; that and the means of every layer's states
    "items": (TaskSpec("items", "items"), ("last",)),
    "label": (TaskSpec("label", "classes", num_classes=CLASSES), ("last", "mean")),
}
SHAPES = [(512, 64, 2), (512, 256, 4)]  # users, D, H
QUICK = [(9, 32, 2)]


@dataclass(frozen=True)
class Group:
    """Some of the users [b], padded to the longest of them, and all indices that the model needs.

    items, distance, prompt_row  [b, L], 0 where there is no event; distance from the newest event; P: no prompt
    weights                      [b, 1, L], one over the length, 0 where there is no event
    """

    users: Tensor
    items: Tensor
    distance: Tensor
    prompt_row: Tensor
    weights: Tensor
    lengths: Tensor

    def to(self, device: str) -> Group:
        """The same on another device."""
        return Group(*(getattr(self, field.name).to(device) for field in fields(self)))


def in_groups(batch: PackedBatch, groups: int, prompts: int = PROMPTS) -> list[Group]:
    """The users of a batch sorted by length and cut into so many groups; one group keeps them all."""
    return [_group(batch, users, prompts) for users in torch.argsort(batch.lengths).chunk(groups)]


def _group(batch: PackedBatch, users: Tensor, prompts: int) -> Group:
    lengths = batch.lengths[users]
    items = torch.cat([batch.items[batch.offsets[b] : batch.offsets[b + 1]] for b in users])
    items = ops.to_padded(items, to_offsets(lengths), int(lengths.max()))
    distance = lengths[:, None] - 1 - torch.arange(items.shape[1])
    real = distance >= 0
    prompt_row = torch.where(real & (distance < prompts), prompts - 1 - distance, prompts)
    weights = (real / lengths[:, None])[:, None]
    return Group(users, items, distance.clamp_min(0), prompt_row, weights, lengths)


class PaddedModel:
    """The same weights on padded groups. The top layer is computed for every row, as a model that reads all does; with
    `newest_only` at the newest rows, as one can that reads these.

    dtype         of what is added, normalised and read
    linear_dtype  of the linear layers' weights: bfloat16 for use under autocast, which then has nothing to cast
    """

    def __init__(self, backbone: Backbone, dtype=torch.float32, linear_dtype: torch.dtype | None = None):
        self.config, self.dtype, self.weights = backbone.config, dtype, {}
        for name, x in backbone.state_dict().items():
            linear = name.startswith("layers.") and ".norm" not in name
            self.weights[name] = x.to(linear_dtype if linear and linear_dtype else dtype)

    def states(self, group: Group, prompt: Tensor, newest_only: bool = False) -> list[Tensor]:
        """Embeddings, then each layer's rows [b, L, D], the last ones normalised; newest_only: these are [b, D].
        prompt [P, D]."""
        rows = torch.cat([prompt, prompt.new_zeros(1, prompt.shape[1])])
        x = F.embedding(group.items, self.weights["table"]) + F.embedding(group.distance, self.weights["position"])
        states = [x + F.embedding(group.prompt_row, rows)]
        layers = [f"layers.{depth}." for depth in range(self.config.num_layers)]
        for layer in layers[:-1] if newest_only else layers:
            states.append(self._layer(states[-1], layer))
        if newest_only:
            states.append(self._newest_rows(states[-1], group, layers[-1]))
        return [*states[:-1], self._norm(states[-1], "norm")]

    def _layer(self, x: Tensor, layer: str) -> Tensor:
        heads = (3, self.config.num_heads, -1)
        qkv = self._linear(self._norm(x, layer + "norm_attention"), layer + "qkv").unflatten(2, heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        return self._after(x, mixed.transpose(1, 2).flatten(2), layer)

    def _newest_rows(self, x: Tensor, group: Group, layer: str) -> Tensor:
        """The layer at the newest rows [b, D] of x [b, L, D]: keys and values of all rows, the rest of these."""
        newest, dim = (torch.arange(len(x), device=x.device), group.lengths - 1), x.shape[2]
        normed, heads = self._norm(x, layer + "norm_attention"), self.config.num_heads
        weight, bias = self.weights[layer + "qkv.weight"], self.weights[layer + "qkv.bias"]
        k, v = F.linear(normed, weight[dim:], bias[dim:]).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.linear(normed[newest], weight[:dim], bias[:dim]).unflatten(1, (heads, 1, -1))
        seen = torch.arange(x.shape[1], device=x.device) < group.lengths[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        return self._after(x[newest], mixed.flatten(1), layer)

    def _after(self, x: Tensor, mixed: Tensor, layer: str) -> Tensor:
        """What a layer does with what attention has mixed."""
        x = x + self._linear(mixed, layer + "out")
        hidden = F.gelu(self._linear(self._norm(x, layer + "norm_ffn"), layer + "ffn_in"))
        return x + self._linear(hidden, layer + "ffn_out")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.weights[name + ".bias"])

    def vectors(
        self, groups: list[Group], prompt: Tensor, readout: tuple[str, ...], newest_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What the head reads [B, F], and the newest states [B, D], in the order of the batch."""
        features, newest = [], []
        for group in groups:
            states = self.states(group, prompt, newest_only)
            newest_row = (torch.arange(len(group.users), device=group.users.device), group.lengths - 1)
            last = states[-1] if newest_only else states[-1][newest_row]
            parts = [last]
            if "mean" in readout:
                parts += [torch.bmm(group.weights.to(state.dtype), state)[:, 0] for state in states]
                parts.append(group.lengths.to(self.dtype).log1p()[:, None])
            newest.append(last)
            features.append(torch.cat(parts, 1))
        place = torch.argsort(torch.cat([group.users for group in groups]))
        return torch.cat(features)[place], torch.cat(newest)[place]


def make_model(dim: int, num_heads: int, *, max_len: int = MAX_LEN, prompts: int = PROMPTS) -> UserModel:
    """A frozen 2-layer backbone and the tasks, nothing of which is zero; no dropout, so that steps can be compared."""
    model = UserModel(Backbone(BackboneConfig(ITEMS, dim, num_heads, max_len=max_len, dropout=0.0)))
    model.freeze_backbone()
    for spec, readout in TASKS.values():
        tied = True if spec.kind == "items" else None
        task = model.add_task(spec, MemoryConfig(prompt_len=prompts, readout=readout, tied=tied, dropout=0.0))
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.normal_(std=0.05)
    return model


def padded_ways(batch: PackedBatch, readout: tuple[str, ...]) -> dict:
    """(groups, newest_only) of each PyTorch way: "padded", the numbers of buckets, and ("newest", buckets) where the
    newest state is all that is read: their top layer is computed at the newest rows alone."""
    buckets = {groups: in_groups(batch, groups) for groups in BUCKETS}
    ways = {"padded": (in_groups(batch, 1), False), **{key: (groups, False) for key, groups in buckets.items()}}
    if readout == ("last",):
        ways |= {("newest", key): (groups, True) for key, groups in buckets.items()}
    return ways


def make_batch(users: int, mean: float = 64, most: int = MAX_LEN) -> PackedBatch:
    """Lognormal lengths of a mean, at most `most`; items of the lower half, so that the upper half is new to all."""
    lengths = lengths_of(users, mean, most=most)
    return PackedBatch.from_packed(torch.randint(1, ITEMS // 2, (int(lengths.sum()),)), to_offsets(lengths))


def assert_as_right_as(got: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """Each tensor is at most twice as far from the float64 one as PyTorch's, root mean square; one rounding is free."""
    for ours, other, want in zip(got, theirs, exact, strict=True):
        error, theirs_error = (ours.double() - want).norm(), (other.double() - want).norm()
        one_rounding = torch.finfo(ours.dtype).eps * want.abs().max() * want.numel() ** 0.5
        if error > max(2 * theirs_error, one_rounding):
            raise AssertionError(f"error {error:.3e}, PyTorch's {theirs_error:.3e}, of one rounding {one_rounding:.3e}")


def forward_gflop(batch: PackedBatch, dim: int) -> tuple[float, float]:
    """Operations (1e9) of all linear layers and of all attention on the real rows of two layers; heads aside."""
    linear = 24 * dim**2 * batch.items.numel()
    attention = 4 * dim * int((batch.lengths * (batch.lengths + 1) // 2).sum())
    return 2 * linear / 1e9, 2 * attention / 1e9


def report_ways(report: Report, name: str, ways: dict, gflop: float, dtype: torch.dtype) -> None:
    """Time "fused", the ways of `padded_ways` and a matrix product of the dtype in turn; one row."""
    ms = medians_ms({**ways, "product": matrix_product(dtype)}, least=3)
    ours, padded, buckets = ms["fused"], ms["padded"], min(ms[groups] for groups in BUCKETS)
    newest = min((ms[way] for way in ms if isinstance(way, tuple)), default="")
    share = 100 * (gflop / ours) / (PRODUCT_GFLOP / ms["product"])
    ratios = padded / ours, buckets / ours, newest and newest / ours
    report.row(name, *ratios, ours, padded, buckets, newest, share)


COLUMNS = ["what", "padded / fused", "buckets / fused", "buckets, newest rows / fused"]
COLUMNS += ["fused", "padded", "best of 8, 16, 32 buckets", "the same, top layer at the newest rows", "% of product"]
