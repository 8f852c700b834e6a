"""attention_plan: check offsets and prefixes once, build the work list of a batch once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import (
    check_like,
    check_offset_values,
    check_offsets,
    check_range,
    check_shape,
    check_tensor,
)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Who attends to what in a batch, checked: reused by all layers and by backward.

    It keeps its own copy of the offsets; changing them in place afterwards changes nothing.
    """

    offsets: Tensor
    """[B + 1] int64."""
    prefix_offsets: Tensor | None
    """[R + 1] int64, None without a prefix."""
    prefix_index: Tensor | None
    """[B] int64, filled in where it was left out, None without a prefix."""
    work: Tensor
    """int64 work list, laid out as csrc/attention_plan.h says."""
    batch: int
    """Histories B."""
    num_prefixes: int
    """Prefixes R, 0 without a prefix."""
    total: int
    """Packed rows T."""
    prefix_total: int
    """Packed prefix rows M."""

    def to(self, device) -> "AttentionPlan":
        """The same plan on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return AttentionPlan(
            self.offsets.to(device),
            move(self.prefix_offsets),
            move(self.prefix_index),
            self.work.to(device),
            self.batch,
            self.num_prefixes,
            self.total,
            self.prefix_total,
        )


def attention_plan(
    offsets: Tensor, prefix_offsets: Tensor | None = None, prefix_index: Tensor | None = None
) -> AttentionPlan:
    """Check offsets [B + 1], prefix_offsets [R + 1] and prefix_index [B] (all int64) and build the work list.

    prefix_index may be left out when R == 1 (all see it) or R == B (each sees its own); -1 is no prefix.
    Raises ValueError or TypeError naming what is wrong.
    """
    check_layout(offsets, prefix_offsets, prefix_index, "offsets", offsets)
    check_offset_values("offsets", offsets, None, "")
    if prefix_offsets is not None:
        check_offset_values("prefix_offsets", prefix_offsets, None, "")
        if prefix_index is not None:
            check_range("prefix_index", prefix_index, -1, len(prefix_offsets) - 2)
    index = resolve_prefix_index(offsets, prefix_offsets, prefix_index)
    return AttentionPlan(
        offsets=offsets,
        prefix_offsets=prefix_offsets,
        prefix_index=index,
        work=reference.attention_plan(offsets, prefix_offsets, index),
        batch=offsets.shape[0] - 1,
        num_prefixes=0 if prefix_offsets is None else prefix_offsets.shape[0] - 1,
        total=int(offsets[-1]),
        prefix_total=0 if prefix_offsets is None else int(prefix_offsets[-1]),
    )


def check_layout(offsets, prefix_offsets, prefix_index, like_name: str, like: Tensor) -> None:
    """Types, shapes and devices of what a plan is made of; no values are read."""
    check_offsets("offsets", offsets, like_name, like)
    if prefix_offsets is None:
        if prefix_index is not None:
            raise ValueError("prefix_index needs a prefix, got prefix_index without prefix_offsets")
        return
    check_offsets("prefix_offsets", prefix_offsets, like_name, like)
    batch, num_prefixes = offsets.shape[0] - 1, prefix_offsets.shape[0] - 1
    if prefix_index is not None:
        check_tensor("prefix_index", prefix_index, 1, (torch.int64,))
        check_shape("prefix_index", prefix_index, (batch,), "[B]")
        check_like("prefix_index", prefix_index, like_name, like, dtype=False)
    elif num_prefixes not in (1, batch):
        raise ValueError(
            f"prefix_index may be left out only when there is one prefix or one a history, "
            f"got {num_prefixes} prefixes and {batch} histories"
        )


def resolve_prefix_index(offsets: Tensor, prefix_offsets: Tensor | None, prefix_index: Tensor | None) -> Tensor | None:
    """prefix_index [B], made when it was left out; None without a prefix."""
    if prefix_offsets is None or prefix_index is not None:
        return prefix_index
    batch = offsets.shape[0] - 1
    if prefix_offsets.shape[0] == 2:
        return offsets.new_zeros(batch)
    return torch.arange(batch, device=offsets.device)
