"""pcl_ext::embed and its backward: the rules on values, schema, kernel, fake, autograd."""

import torch

from pcl_ext.ops import _gpu
from pcl_ext.ops._check import check_offset_values, check_range, check_shape
from pcl_ext.ops._native import (
    BEST_ISA,
    SCALARS,
    C,
    address,
    below_autograd,
    check_floats,
    check_int64,
    define,
    once_only,
    packed_rows,
)

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


def _inputs(items, offsets, prompt_index, table, position, prompt, grad_stride: int) -> tuple:
    """What the kernels take first, and what keeps it alive.

    Numbers: T, B, D, table rows, max_len (-1: no positions), K, P, row strides of table, position and grad_out.
    """
    items, offsets = items.contiguous(), offsets.contiguous()
    prompt_index = None if prompt_index is None else prompt_index.contiguous()
    table_rows, dim = table.shape
    max_len, position_stride = (-1, 0) if position is None else (position.shape[0], position.stride()[0])
    num_prompts, prompt_len = (0, 0) if prompt is None else prompt.shape[:2]
    sizes = (items.shape[0], offsets.shape[0] - 1, dim, table_rows, max_len, num_prompts, prompt_len)
    numbers = (*sizes, table.stride()[0], position_stride, grad_stride)
    rows = (items.data_ptr(), items.dtype == torch.int64, offsets.data_ptr(), address(prompt_index))
    return (*rows, numbers), (items, offsets, prompt_index)


def forward(items, offsets, table, position, prompt, prompt_index, *, isa=BEST_ISA):
    """out [T, D]."""
    table = packed_rows(table, 1)
    position = None if position is None else packed_rows(position, 1)
    prompt = None if prompt is None else prompt.contiguous()
    out = forward_fake(items, offsets, table, position, prompt, prompt_index)
    inputs, _kept = _inputs(items, offsets, prompt_index, table, position, prompt, 0)
    pointers = (table.data_ptr(), address(position), address(prompt), out.data_ptr())
    if _gpu.runs_cuda(table):
        _gpu.launch("embed_fwd", table, *inputs, *pointers, SCALARS[table.dtype])
    elif not C.embed_fwd(*inputs, *pointers, SCALARS[table.dtype], isa, torch.get_num_threads()):
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
    inputs, _kept = _inputs(items, offsets, prompt_index, table, position, prompt, grad_out.stride()[0])
    if _gpu.runs_cuda(table):
        _backward_cuda(grad_out, inputs, grads, needs, items)
        return grads
    pointers = map(address, (grad_out, *grads))
    if not C.embed_bwd(*inputs, *pointers, SCALARS[table.dtype], isa, torch.get_num_threads()):
        check_embed_values(items, offsets, table, position, prompt, prompt_index)
        raise AssertionError("the kernel refused what its rules allow")
    return grads


def _backward_cuda(grad_out, inputs: tuple, grads, needs, items) -> None:
    grad_table, grad_position, grad_prompt = grads
    asked, dtype = needs[1:], SCALARS[grad_out.dtype]
    if needs[0]:
        rows = grad_table.shape[0]
        ids = torch.where((items < 0) | (items >= rows), 0, items)
        grad_table.copy_(torch.ops.aten.embedding_dense_backward(grad_out, ids, rows, -1, False))
    if any(asked):
        size = _gpu.module().embed_bwd_bytes(inputs[-1], *asked, dtype)
        workspace = torch.empty(size, dtype=torch.uint8, device=grad_out.device)
        wanted = (address(grad) if need else 0 for grad, need in zip((grad_position, grad_prompt), asked))
        _gpu.launch("embed_bwd", grad_out, *inputs, address(grad_out), address(workspace), *wanted, dtype)


def backward_fake(grad_out, items, offsets, table, position, prompt, prompt_index, needs):
    """Outputs of backward, unfilled."""
    wanted = zip((table, position, prompt), needs)
    return tuple(x.new_empty(x.shape) if need else grad_out.new_empty(0) for x, need in wanted)


def _check(items, offsets, table, position, prompt, prompt_index, grad_out=None) -> None:
    if items.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"kernels of pcl_ext take items in int32 or int64, got {str(items.dtype)[6:]}")
    check_floats(table, position, prompt, grad_out)
    check_int64(offsets, prompt_index)
    dim, batch = table.shape[1], offsets.shape[0] - 1
    if batch < 0 or table.shape[0] == 0:
        raise ValueError("offsets and table must hold at least one entry, got none")
    if position is not None:
        check_shape("position", position, (position.shape[0], dim), "[max_len, D]")
    if prompt is not None:
        check_shape("prompt", prompt, (*prompt.shape[:2], dim), "[K, P, D]")
    if prompt_index is not None:
        check_shape("prompt_index", prompt_index, (batch,), "[B]")
    if grad_out is not None:
        check_shape("grad_out", grad_out, (items.shape[0], dim), "[T, D]")


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return below_autograd(torch.ops.pcl_ext.embed.default, *inputs)

    @staticmethod
    @once_only
    def backward(ctx, saved, grad_out):
        needs = ctx.needs_input_grad[2:5]
        grads = torch.ops.pcl_ext.embed_backward.default(grad_out, *saved, needs)
        return None, None, *(g if need else None for g, need in zip(grads, needs)), None


define(
    "embed_backward",
    f"(Tensor grad_out, {_ROWS}, {_TABLES}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
    check=lambda grad_out, *inputs: _check(*inputs[:6], grad_out),
    cuda=True,
)
define("embed", f"({_ROWS}, {_TABLES}) -> Tensor", forward, forward_fake, _Embed, check=_check, cuda=True)
