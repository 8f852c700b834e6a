"""pcl_ext::embed and its backward: the rules on values, schema, kernel, fake, autograd."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_ext.ops._check import check_offset_values, check_range
from pcl_ext.ops._native import BEST_ISA, SCALARS, C, address, below_autograd, define, packed_rows

_ROWS = "Tensor items, Tensor offsets"
_TABLES = "Tensor table, Tensor? position, Tensor? prompt, Tensor? prompt_index"


def check_embed_values(items, offsets, table, position, prompt, prompt_index) -> None:
    """The rules on values: offsets, ids, lengths, prompt numbers. CPU only."""
    check_offset_values("offsets", offsets, items.shape[0], "len(items)")
    check_range("items", items, 0, table.shape[0] - 1)
    if position is not None and offsets.shape[0] > 1:
        longest = int(offsets.diff().max())
        if longest > position.shape[0]:
            raise ValueError(f"histories must be at most max_len = {position.shape[0]} long, got one of {longest}")
    if prompt_index is not None:
        check_range("prompt_index", prompt_index, -1, prompt.shape[0] - 1)


def _numbers(items, offsets, table, position, prompt, grad_stride: int) -> tuple[int, ...]:
    """T, B, D, table rows, max_len (-1: no positions), K, P, row strides of table, position and grad_out."""
    max_len, position_stride = (-1, 0) if position is None else (position.shape[0], position.stride(0))
    num_prompts, prompt_len = (0, 0) if prompt is None else prompt.shape[:2]
    sizes = (items.shape[0], offsets.shape[0] - 1, table.shape[1], table.shape[0], max_len, num_prompts, prompt_len)
    return (*sizes, table.stride(0), position_stride, grad_stride)


def _rows(items: Tensor, offsets: Tensor, prompt_index: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in (items, offsets, prompt_index)]


def _call(kernel, rows: list[Tensor | None], numbers: tuple, tensors: tuple, dtype: torch.dtype, isa: int) -> bool:
    items, offsets, prompt_index = map(address, rows)
    pointers = map(address, tensors)
    wide = rows[0].dtype == torch.int64
    return kernel(items, wide, offsets, prompt_index, numbers, *pointers, SCALARS[dtype], isa, torch.get_num_threads())


def forward(items, offsets, table, position, prompt, prompt_index, *, isa=BEST_ISA):
    """out [T, D]."""
    out = forward_fake(items, offsets, table, position, prompt, prompt_index)
    table = packed_rows(table, 1)
    position = None if position is None else packed_rows(position, 1)
    prompt = None if prompt is None else prompt.contiguous()
    numbers = _numbers(items, offsets, table, position, prompt, 0)
    rows = _rows(items, offsets, prompt_index)
    if not _call(C.embed_fwd, rows, numbers, (table, position, prompt, out), table.dtype, isa):
        check_embed_values(items, offsets, table, position, prompt, prompt_index)
        raise AssertionError("the kernel refused what its rules allow")
    return out


def forward_fake(items, offsets, table, position, prompt, prompt_index):
    """Output of forward, unfilled."""
    return table.new_empty(items.shape[0], table.shape[1])


def backward(grad_out, items, offsets, table, position, prompt, prompt_index, needs, *, isa=BEST_ISA):
    """Gradients of table, position, prompt; empty where needs says no."""
    grads = backward_fake(grad_out, items, offsets, table, position, prompt, prompt_index, needs)
    grad_out = packed_rows(grad_out, 1)
    numbers = _numbers(items, offsets, table, position, prompt, grad_out.stride(0))
    rows = _rows(items, offsets, prompt_index)
    if not _call(C.embed_bwd, rows, numbers, (grad_out, *grads), table.dtype, isa):
        check_embed_values(items, offsets, table, position, prompt, prompt_index)
        raise AssertionError("the kernel refused what its rules allow")
    return grads


def backward_fake(grad_out, items, offsets, table, position, prompt, prompt_index, needs):
    """Outputs of backward, unfilled."""
    wanted = zip((table, position, prompt), needs)
    return tuple(x.new_empty(x.shape) if need else grad_out.new_empty(0) for x, need in wanted)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return below_autograd(torch.ops.pcl_ext.embed.default, *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        needs = ctx.needs_input_grad[2:5]
        grads = torch.ops.pcl_ext.embed_backward.default(grad_out, *ctx.saved_tensors, needs)
        return None, None, *(g if need else None for g, need in zip(grads, needs)), None


define(
    "embed_backward",
    f"(Tensor grad_out, {_ROWS}, {_TABLES}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
)
define("embed", f"({_ROWS}, {_TABLES}) -> Tensor", forward, forward_fake, _Embed)
