"""attention_plan: check offsets and prefixes once, build the work list of a batch once."""

from dataclasses import dataclass, replace

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
from pcl_ext.ops._gpu import runs_cuda
from pcl_ext.ops._native import C, address, call, check_int64, define


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Who attends to what in a batch, checked: reused by all layers and by backward.

    It holds for the numbers that it was made from: tensors that were given are not to be changed in place afterwards.
    """

    offsets: Tensor
    """[B + 1] int64."""
    prefix_offsets: Tensor | None
    """[R + 1] int64, None without a prefix."""
    prefix_index: Tensor | None
    """[B] int64, filled in where it was left out, None without a prefix."""
    index_left_out: bool
    """Whether it was."""
    work: Tensor
    """int64 work list, laid out as csrc/attention_plan.h says; on CUDA what `cuda_list` gives."""
    batch: int
    """Histories B."""
    num_prefixes: int
    """Prefixes R, 0 without a prefix."""
    total: int | None
    """Packed rows T; None where the plan was made on CUDA, and nobody has looked."""
    prefix_total: int | None
    """Packed prefix rows M, or None as above."""

    def to(self, device, *, non_blocking: bool = False) -> "AttentionPlan":
        """The same plan on another device; one made on CUDA is checked, and so waited for, when it comes to the CPU."""
        if self.total is not None and torch.device(device) == self.offsets.device == self.work.device:
            return self
        layout = (self.offsets, self.prefix_offsets, self.prefix_index)
        non_blocking = non_blocking and not runs_cuda(self.offsets)
        moved = [None if x is None else x.to(device, non_blocking=non_blocking) for x in layout]
        here, there = self.total is None or runs_cuda(self.offsets), runs_cuda(moved[0])
        if here and not there:
            return attention_plan(*moved[:2], None if self.index_left_out else moved[2])
        work = cuda_list(*layout) if there and not here else self.work
        numbers = (self.batch, self.num_prefixes, self.total, self.prefix_total)
        work = work.to(device, non_blocking=non_blocking)
        return AttentionPlan(*moved, self.index_left_out, work, *numbers)

    def pin_memory(self) -> "AttentionPlan":
        """The same plan in page-locked memory, but for its work list: on CUDA that is another."""
        names = ("offsets", "prefix_offsets", "prefix_index")
        return replace(self, **{n: x.pin_memory() for n in names if (x := getattr(self, n)) is not None})


def attention_plan(
    offsets: Tensor, prefix_offsets: Tensor | None = None, prefix_index: Tensor | None = None
) -> AttentionPlan:
    """Check offsets [B + 1], prefix_offsets [R + 1] and prefix_index [B] (all int64) and build the work list.

    prefix_index may be left out when R == 1 (all see it) or R == B (each sees its own); -1 is no prefix.
    Raises ValueError or TypeError naming what is wrong. Values are looked at on the CPU alone: on CUDA that would stop
    the GPU, and kernels stay inside their tensors whatever a plan holds.
    """
    check_layout(offsets, prefix_offsets, prefix_index, "offsets", offsets)
    unread, index = runs_cuda(offsets), resolve_prefix_index(offsets, prefix_offsets, prefix_index)
    return AttentionPlan(
        offsets=offsets,
        prefix_offsets=prefix_offsets,
        prefix_index=index,
        index_left_out=prefix_index is None,
        work=(cuda_list if unread else work_list)(offsets, prefix_offsets, index),
        batch=offsets.shape[0] - 1,
        num_prefixes=0 if prefix_offsets is None else prefix_offsets.shape[0] - 1,
        total=None if unread else int(offsets[-1]),
        prefix_total=0 if prefix_offsets is None else None if unread else int(prefix_offsets[-1]),
    )


def work_list(offsets, prefix_offsets, prefix_index, total: int = -1, prefix_total: int = -1) -> Tensor:
    """The checked work list; offsets must end at total and prefix_offsets at prefix_total unless these are -1."""
    index = resolve_prefix_index(offsets, prefix_offsets, prefix_index)
    if C is not None and offsets.device.type == "cpu":
        return call(
            torch.ops.pcl_ext.attention_plan.default, kernel, offsets, prefix_offsets, index, total, prefix_total
        )
    check_values(offsets, prefix_offsets, index, total, prefix_total)
    return reference.attention_plan(offsets, prefix_offsets, index)


def cuda_list(offsets, prefix_offsets, prefix_index, *, backward: bool = True) -> Tensor:
    """What CUDA kernels read, unchecked: offsets, prefix_offsets, prefix_index and, for backward, the members."""
    index = resolve_prefix_index(offsets, prefix_offsets, prefix_index)
    if index is None:
        return torch.cat([offsets])
    members = prefix_members(offsets, index, prefix_offsets.shape[0] - 1) if backward else ()
    return torch.cat([offsets, prefix_offsets, index, *members])


def prefix_members(offsets: Tensor, prefix_index: Tensor, num_prefixes: int) -> tuple[Tensor, Tensor, Tensor]:
    """AttentionMembers of csrc/prompt_attention.h: histories [B] in the order of their prefixes, runs of 16 rows up to
    and with each [B], and where each prefix's histories begin, and the last's end [R + 1]."""
    members = torch.argsort(prefix_index, stable=True)
    runs = (offsets.diff().clamp_min(0) + 15) // 16
    begins = torch.searchsorted(prefix_index[members], torch.arange(num_prefixes + 1, device=offsets.device))
    return members, runs[members].cumsum(0), begins


def check_values(
    offsets, prefix_offsets, prefix_index, total: int, prefix_total: int, total_name: str = "len(q)"
) -> None:
    """What offsets and prefix_index hold; totals of -1 are any."""
    check_offset_values("offsets", offsets, None if total < 0 else total, total_name)
    if prefix_offsets is not None:
        end = None if prefix_total < 0 else prefix_total
        check_offset_values("prefix_offsets", prefix_offsets, end, "len(prefix_k)")
        check_range("prefix_index", prefix_index, -1, prefix_offsets.shape[0] - 2)


def kernel(offsets, prefix_offsets, prefix_index, total, prefix_total):
    """The work list, built by the compiled module."""
    work = fake(offsets, prefix_offsets, prefix_index, total, prefix_total)
    offsets = offsets.contiguous()
    prefix_offsets = None if prefix_offsets is None else prefix_offsets.contiguous()
    prefix_index = None if prefix_index is None else prefix_index.contiguous()
    num_prefixes = 0 if prefix_offsets is None else prefix_offsets.shape[0] - 1
    pointers = map(address, (offsets, prefix_offsets, prefix_index, work))
    if not C.attention_plan(*pointers, offsets.shape[0] - 1, num_prefixes, total, prefix_total):
        check_values(offsets, prefix_offsets, prefix_index, total, prefix_total)
        raise AssertionError("the kernel refused what its rules allow")
    return work


def fake(offsets, prefix_offsets, prefix_index, total, prefix_total):
    """A work list, unfilled: its size follows from the number of histories and prefixes."""
    batch = offsets.shape[0] - 1
    num_prefixes = 0 if prefix_offsets is None else prefix_offsets.shape[0] - 1
    return offsets.new_empty(5 * batch + 2 * num_prefixes + 5)


def _check_op(offsets, prefix_offsets, prefix_index) -> None:
    check_int64(offsets, prefix_offsets, prefix_index)
    if prefix_index is not None:
        check_shape("prefix_index", prefix_index, (offsets.shape[0] - 1,), "[B]")


define(
    "attention_plan",
    "(Tensor offsets, Tensor? prefix_offsets, Tensor? prefix_index, SymInt total, SymInt prefix_total) -> Tensor",
    kernel,
    fake,
    check=lambda *inputs: _check_op(*inputs[:3]),
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
