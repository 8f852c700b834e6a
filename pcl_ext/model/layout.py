"""Where the rows of a pass lie: histories, and the rows computed before that they may look back at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pcl_ext import ops


@dataclass(frozen=True)
class LayerPrefix:
    """Rows computed before that histories may look back at, as the keys and values of every layer.

    keys, values  num_layers tensors [M, H, d]
    offsets       [R + 1] int64, first row of each prefix
    index         [B] int64, the prefix of each history, -1 none; may be None when R is 1 or B
    """

    keys: list[Tensor]
    values: list[Tensor]
    offsets: Tensor
    index: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Histories of one pass, shared by all layers.

    offsets         [B + 1] int64
    plan            of the attention over them and their prefixes
    prefix_offsets  [R + 1] int64, None without a prefix
    prefix_index    [B] int64, None without a prefix
    """

    offsets: Tensor
    plan: ops.AttentionPlan
    prefix_offsets: Tensor | None = None
    prefix_index: Tensor | None = None

    @classmethod
    def of(cls, offsets: Tensor, plan: ops.AttentionPlan | None, prefix: LayerPrefix | None) -> Layout:
        """The layout of a pass; the plan is made where there is none."""
        shared = (prefix.offsets, prefix.index) if prefix else ()
        plan = plan or ops.attention_plan(offsets, *shared)
        return cls(offsets, plan, *((prefix.offsets, plan.prefix_index) if prefix else ()))

    @cached_property
    def newest(self) -> Tensor:
        """[m] int64, the newest row of each history that is not empty."""
        return newest_rows(self.offsets)

    def prefixed(self, before: tuple[Tensor, Tensor] | None) -> tuple:
        """The last arguments of an attention: keys and values of a layer's prefix, and who sees which; or nothing."""
        return () if before is None else (*before, self.prefix_offsets, self.prefix_index)


def newest_rows(offsets: Tensor) -> Tensor:
    """offsets [B + 1] -> [m] int64, the newest row of each history that is not empty."""
    return offsets[1:][offsets.diff() > 0] - 1


def to_offsets(lengths: Tensor) -> Tensor:
    """lengths [B] -> offsets [B + 1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
