"""pcl_ext::to_padded and pcl_ext::to_packed, each the backward of the other: values, schema, kernel, fake, autograd."""

import math

import torch
from torch import Tensor

from pcl_ext.ops import _gpu
from pcl_ext.ops._check import check_offset_values, check_shape
from pcl_ext.ops._native import C, address, below_autograd, check_int64, define, packed_rows


def check_padded_values(offsets: Tensor, total: int, total_name: str, max_seqlen: int) -> None:
    """offsets fit total packed rows and no history is longer than max_seqlen. CPU only."""
    check_offset_values("offsets", offsets, total, total_name)
    if offsets.shape[0] > 1:
        longest = int(offsets.diff().max())
        if longest > max_seqlen:
            raise ValueError(f"histories must be at most max_seqlen = {max_seqlen} long, got one of {longest}")


def to_padded(packed, offsets, max_seqlen, fill):
    """padded [B, max_seqlen, ...]."""
    packed, offsets = packed_rows(packed.resolve_conj(), 1), offsets.contiguous()
    batch, (total, *row) = offsets.shape[0] - 1, packed.shape
    padded = torch.empty(batch, max_seqlen, *row, dtype=packed.dtype, device=packed.device)
    zero = fill == 0 and str(fill) != "-0.0"
    padding = None if zero else packed.new_full(row, fill)
    size = packed.element_size()
    sizes = (batch, max_seqlen, total, math.prod(row) * size, packed.stride(0) * size)
    pointers = map(address, (packed, offsets, padding, padded))
    if _gpu.runs_cuda(packed):
        _gpu.launch("to_padded", packed, *pointers, *sizes)
    elif not C.to_padded(*pointers, *sizes, torch.get_num_threads()):
        check_padded_values(offsets, packed.shape[0], "len(packed)", max_seqlen)
        raise AssertionError("the kernel refused what its rules allow")
    return padded


def to_padded_fake(packed, offsets, max_seqlen, fill):
    """Output of to_padded, unfilled."""
    return packed.new_empty(offsets.shape[0] - 1, max_seqlen, *packed.shape[1:])


def to_packed(padded, offsets, total):
    """packed [total, ...]."""
    padded, offsets = packed_rows(padded.resolve_conj(), 2), offsets.contiguous()
    batch, max_seqlen, *row = padded.shape
    if not _gpu.runs_cuda(padded) and total > batch * max_seqlen:  # no room is asked for what cannot be
        check_padded_values(offsets, total, "total", max_seqlen)
    packed = torch.empty(total, *row, dtype=padded.dtype, device=padded.device)
    size, (history_stride, row_stride, *_) = padded.element_size(), padded.stride()
    sizes = (batch, max_seqlen, total, math.prod(row) * size, row_stride * size, history_stride * size)
    pointers = map(address, (padded, offsets, packed))
    if _gpu.runs_cuda(padded):
        _gpu.launch("to_packed", padded, *pointers, *sizes)
    elif not C.to_packed(*pointers, *sizes, torch.get_num_threads()):
        check_padded_values(offsets, total, "total", padded.shape[1])
        raise AssertionError("the kernel refused what its rules allow")
    return packed


def to_packed_fake(padded, offsets, total):
    """Output of to_packed, unfilled."""
    return padded.new_empty(total, *padded.shape[2:])


def check_layout(offsets: Tensor, batch: int) -> None:
    """What a saved program hands over: offsets of so many histories."""
    check_int64(offsets)
    check_shape("offsets", offsets, (max(batch, 0) + 1,), "[B + 1]")


class _ToPadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, offsets, max_seqlen, fill):
        ctx.save_for_backward(offsets)
        ctx.total = packed.shape[0]
        return below_autograd(torch.ops.pcl_ext.to_padded.default, packed, offsets, max_seqlen, fill)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.pcl_ext.to_packed.default(grad, *ctx.saved_tensors, ctx.total), None, None, None


class _ToPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, offsets, total):
        ctx.save_for_backward(offsets)
        ctx.max_seqlen = padded.shape[1]
        return below_autograd(torch.ops.pcl_ext.to_packed.default, padded, offsets, total)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.pcl_ext.to_padded.default(grad, *ctx.saved_tensors, ctx.max_seqlen, 0), None, None


define(
    "to_padded",
    "(Tensor packed, Tensor offsets, SymInt max_seqlen, Scalar fill) -> Tensor",
    to_padded,
    to_padded_fake,
    _ToPadded,
    check=lambda packed, offsets, *_: check_layout(offsets, offsets.shape[0] - 1),
    cuda=True,
)
define(
    "to_packed",
    "(Tensor padded, Tensor offsets, SymInt total) -> Tensor",
    to_packed,
    to_packed_fake,
    _ToPacked,
    check=lambda padded, offsets, *_: check_layout(offsets, padded.shape[0]),
    cuda=True,
)
