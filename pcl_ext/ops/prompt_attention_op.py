"""pcl_ext::prompt_attention and its backward, pcl_ext::newest_attention: schema, kernel, fake, autograd."""

import torch
from torch import Tensor

from pcl_ext.ops import _gpu
from pcl_ext.ops._check import check_shape
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
from pcl_ext.ops.attention_plan import prefix_members

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor work"
_NUMBERS = "SymInt batch, SymInt num_prefixes, bool causal, float scale"


def _inputs(q, k, v, prefix_k, prefix_v, work, batch: int, num_prefixes: int) -> tuple[tuple, tuple, list]:
    """Addresses; T, M, H, d, B, R, then row and head strides of q, k, v, prefix_k, prefix_v; what keeps them alive."""
    total, num_heads, dim = q.shape
    packed = (num_heads * dim, dim)
    on_cuda = _gpu.runs_cuda(q)
    to_rows = _rows_of_16_bytes if on_cuda else packed_rows
    pointers, strides, rows = [], [], []
    for x in (q, k, v) if prefix_k is None else (q, k, v, prefix_k, prefix_v):
        if not on_cuda and x.is_contiguous():
            pointers.append(x.data_ptr())
            strides += packed
        elif not on_cuda and x.stride()[2] == 1:
            pointers.append(x.data_ptr())
            strides += x.stride()[:2]
        else:
            x = to_rows(x, 2)
            rows.append(x)
            pointers.append(x.data_ptr())
            strides += _strides(x)
    if prefix_k is None:
        pointers, strides, prefix_total = (*pointers, 0, 0), (*strides, 0, 0, 0, 0), 0
    else:
        prefix_total = prefix_k.shape[0]
    return (*pointers, work.data_ptr()), (total, prefix_total, num_heads, dim, batch, num_prefixes, *strides), rows


def _strides(x: Tensor) -> list[int]:
    """Row and head strides; 0 for one row or head alone, whose stride may be any number, aligned or not."""
    return [step if size > 1 else 0 for size, step in zip(x.shape[:2], x.stride())]


def _rows_of_16_bytes(x: Tensor, first: int) -> Tensor:
    """packed_rows, each beginning at a multiple of 16 bytes, as CUDA kernels read them."""
    x = packed_rows(x, first)
    steps = [x.data_ptr(), *(step * x.element_size() for size, step in zip(x.shape, x.stride()[:first]) if size > 1)]
    return x.clone(memory_format=torch.contiguous_format) if any(step % 16 for step in steps) else x


def _lists(work: Tensor, batch: int, num_prefixes: int) -> tuple[int, int, int]:
    """Addresses of offsets, prefix_offsets and prefix_index in a work list, which begins with these three."""
    begin, size = work.data_ptr(), 8
    return begin, begin + (batch + 1) * size, begin + (batch + num_prefixes + 2) * size


def forward(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale, *, isa=BEST_ISA):
    """out [T, H, d] and, for backward, [T, H, 2]: each row's largest score, one over its softmax denominator."""
    work = work.contiguous()
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    stats = torch.empty(*q.shape[:2], 2, dtype=sums, device=q.device)
    if not _gpu.runs_cuda(q):
        inputs = (q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale)
        return _fill(*inputs, stats.data_ptr(), isa), stats
    pointers, numbers, _copies = _inputs(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    pointers = (*pointers[:5], *_lists(work, batch, num_prefixes))
    results = (SCALARS[q.dtype], out.data_ptr(), stats.data_ptr())
    _gpu.launch("prompt_attention_fwd", q, pointers, numbers, causal, scale, *results)
    return out, stats


def output(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale) -> tuple[Tensor, ...]:
    """forward, where only out is asked for."""
    if _gpu.runs_cuda(q):
        return forward(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale)
    return (_fill(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale, 0, BEST_ISA),)


def _fill(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale, stats: int, isa: int) -> Tensor:
    """out on the CPU; stats: where the rows' statistics go, 0 for nowhere."""
    pointers, numbers, _copies = _inputs(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes)
    out = q.new_empty(*q.shape)
    work_of = (SCALARS[q.dtype], isa, torch.get_num_threads())
    C.prompt_attention_fwd(pointers, numbers, causal, scale, *work_of, out.data_ptr(), stats)
    return out


def newest(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, scale, *, isa=BEST_ISA):
    """out [m, H, d] of the histories' newest rows q [m, H, d], on the CPU; nothing for a backward is kept."""
    work = work.contiguous()
    pointers, numbers, _copies = _inputs(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes)
    out = q.new_empty(*q.shape)
    work_of = (SCALARS[q.dtype], isa, torch.get_num_threads())
    if not C.newest_attention_fwd(pointers, numbers, scale, *work_of, out.data_ptr()):
        check_newest(q, int((work[: batch + 1].diff() > 0).sum()))
        raise AssertionError("the kernel refused what its rules allow")
    return out


def newest_fake(q, *_):
    """Output of newest, unfilled."""
    return q.new_empty(q.shape)


def check_newest(q: Tensor, filled: int) -> None:
    """ValueError unless q [m, H, d] has a row for each of the histories that are not empty."""
    check_shape("q", q, (filled, *q.shape[1:]), "[m, H, d], m histories that are not empty")


def forward_fake(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale):
    """Outputs of forward, unfilled."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2, dtype=dtype)


def backward(
    grad_out, q, k, v, prefix_k, prefix_v, work, out, stats, batch, num_prefixes, causal, scale, needs, *, isa=BEST_ISA
):
    """Gradients of q, k, v, prefix_k, prefix_v; empty where needs says no."""
    grads = backward_fake(
        grad_out, q, k, v, prefix_k, prefix_v, work, out, stats, batch, num_prefixes, causal, scale, needs
    )
    work, out, stats = (x.contiguous() for x in (work, out, stats))  # a caller's hooks may lay them out anew
    pointers, numbers, _copies = _inputs(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes)
    if _gpu.runs_cuda(q):
        work_of = (work, batch, num_prefixes)
        _backward_cuda(pointers, numbers, causal, scale, grad_out, out, stats, grads, needs, work_of)
        return grads
    grad_out = packed_rows(grad_out, 2)
    C.prompt_attention_bwd(
        pointers,
        numbers,
        causal,
        scale,
        SCALARS[q.dtype],
        isa,
        torch.get_num_threads(),
        tuple(map(address, (grad_out, out, stats, *grads))),
        *grad_out.stride()[:2],
    )
    return grads


def _backward_cuda(pointers, numbers, causal, scale, grad_out, out, stats, grads, needs, work_of) -> None:
    work, batch, num_prefixes = work_of
    pointers = (*pointers[:5], *_lists(work, batch, num_prefixes))
    dtype, prefix = SCALARS[out.dtype], num_prefixes > 0 and any(needs[3:])
    for grad in grads[3:]:  # kernels fill the rows of prefixes, and prefix_offsets, unread here, may not name all
        grad.zero_()
    members = _members(work, batch, num_prefixes) if prefix else (None, None, None)
    grad_out, out = _rows_of_16_bytes(grad_out, 2), _rows_of_16_bytes(out, 2)
    stats = stats.clone() if stats.data_ptr() % 8 else stats
    with torch.cuda.device_of(out):  # how much is needed depends on the GPU
        size = _gpu.module().prompt_attention_bwd_bytes(pointers, numbers, prefix, dtype)
    workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
    asked = (grad if need else None for grad, need in zip(grads, needs))
    rows = tuple(map(address, (grad_out, out, stats, *asked, *members)))
    rest = (rows, *_strides(grad_out), address(workspace))
    _gpu.launch("prompt_attention_bwd", out, pointers, numbers, causal, scale, dtype, *rest)


def _members(work: Tensor, batch: int, num_prefixes: int) -> tuple[Tensor, ...]:
    """`prefix_members`, as the list holds them; a list of the CPU, or of a forward without gradients, does not."""
    layout, sizes = 2 * batch + num_prefixes + 2, (batch, batch, num_prefixes + 1)
    if work.numel() == layout + sum(sizes):
        return work[layout:].split(sizes)
    return prefix_members(work[: batch + 1], work[layout - batch : layout], num_prefixes)


def backward_fake(grad_out, q, k, v, prefix_k, prefix_v, work, out, stats, batch, num_prefixes, causal, scale, needs):
    """Outputs of backward, unfilled."""
    inputs = (q, k, v, prefix_k, prefix_v)
    return tuple(x.new_empty(x.shape) if need else q.new_empty(0) for x, need in zip(inputs, needs))


def _check(q, k, v, prefix_k, prefix_v, work, batch: int, num_prefixes: int) -> None:
    """A saved program calls the op by its name, with tensors that nobody has looked at since."""
    check_floats(q, k, v, prefix_k, prefix_v)
    check_int64(work)
    rows, (num_heads, dim) = k.shape[0], q.shape[1:]
    check_shape("k", k, (rows, num_heads, dim), "[T, H, d]")
    check_shape("v", v, (rows, num_heads, dim), "[T, H, d]")
    prefix_rows = 0
    if num_prefixes:
        prefix_rows = prefix_k.shape[0]
        check_shape("prefix_k", prefix_k, (prefix_rows, num_heads, dim), "[M, H, d]")
        check_shape("prefix_v", prefix_v, (prefix_rows, num_heads, dim), "[M, H, d]")
    if _gpu.runs_cuda(q):
        _check_cuda_list(work, batch, num_prefixes)
        return
    check_shape("work", work, (5 * batch + 2 * num_prefixes + 5,), "the work list of as many histories and prefixes")
    ends = int(work[batch]), int(work[batch + 1 + num_prefixes])
    if ends != (rows, prefix_rows):
        raise ValueError(f"work must be of {rows} rows and {prefix_rows} rows of prefixes, got {ends[0]} and {ends[1]}")


def _check_cuda_list(work, batch: int, num_prefixes: int) -> None:
    """work is as long as what kernels read of `cuda_list`; they stay inside their tensors whatever it holds."""
    least = 2 * batch + num_prefixes + 2 if num_prefixes else batch + 1
    if work.dim() != 1 or work.numel() < least:
        raise ValueError(
            f"work must be a list of at least {least} numbers for {batch} histories and {num_prefixes} prefixes, got "
            f"shape {tuple(work.shape)}"
        )


def _check_forward(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, *_) -> None:
    _check(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes)
    check_shape("q", q, k.shape, "[T, H, d]")


def _check_backward(grad_out, q, k, v, prefix_k, prefix_v, work, out, stats, batch, num_prefixes, *_) -> None:
    _check_forward(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes)
    check_floats(q, grad_out, out)
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    if stats.dtype != sums:
        raise TypeError(
            f"stats must be {str(sums)[6:]}, got {str(stats.dtype)[6:]}: hooks of saved tensors give back their dtypes"
        )
    for name, value in (("grad_out", grad_out), ("out", out)):
        check_shape(name, value, q.shape, "[T, H, d]")
    check_shape("stats", stats, (*q.shape[:2], 2), "[T, H, 2]")


class _PromptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, work, *numbers):
        out, stats = below_autograd(
            torch.ops.pcl_ext.prompt_attention.default, q, k, v, prefix_k, prefix_v, work, *numbers
        )
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, work, out, stats)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    @once_only
    def backward(ctx, saved, grad_out, _):
        needs = ctx.needs_input_grad[:5]
        rest = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad_out is None:
            return (None,) * 5 + rest
        grads = torch.ops.pcl_ext.prompt_attention_backward.default(grad_out, *saved, *ctx.numbers, needs)
        return tuple(g if need else None for g, need in zip(grads, needs)) + rest


define(
    "prompt_attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor stats, {_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
    check=_check_backward,
    cuda=True,
)
define(
    "prompt_attention",
    f"({_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)",
    forward,
    forward_fake,
    _PromptAttention,
    check=_check_forward,
    cuda=True,
)
define(
    "newest_attention",
    f"({_INPUTS}, SymInt batch, SymInt num_prefixes, float scale) -> Tensor",
    newest,
    newest_fake,
    check=lambda *inputs: _check(*inputs[:8]),
)
