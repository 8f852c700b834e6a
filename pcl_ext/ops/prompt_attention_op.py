"""pcl_ext::prompt_attention and its backward: schema, kernel, fake, autograd."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_ext.ops._native import BEST_ISA, SCALARS, C, address, below_autograd, define, packed_rows

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor work"
_NUMBERS = "SymInt batch, SymInt num_prefixes, bool causal, float scale"


def _pointers(rows: list[Tensor | None], work: Tensor) -> tuple[int, ...]:
    return (*map(address, rows), work.data_ptr())


def _numbers(rows: list[Tensor | None], batch: int, num_prefixes: int) -> tuple[int, ...]:
    """T, M, H, d, B, R, then row and head strides of q, k, v, prefix_k, prefix_v."""
    total, num_heads, dim = rows[0].shape
    prefix_total = 0 if rows[3] is None else rows[3].shape[0]
    strides = [s for x in rows for s in ((0, 0) if x is None else x.stride()[:2])]
    return (total, prefix_total, num_heads, dim, batch, num_prefixes, *strides)


def _readable(*rows: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else packed_rows(x, 2) for x in rows]


def forward(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale, *, isa=BEST_ISA):
    """out [T, H, d] and, for backward, [T, H, 2]: each row's largest score, one over its softmax denominator."""
    out, stats = forward_fake(q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale)
    rows = _readable(q, k, v, prefix_k, prefix_v)
    C.prompt_attention_fwd(
        _pointers(rows, work),
        _numbers(rows, batch, num_prefixes),
        causal,
        scale,
        SCALARS[q.dtype],
        isa,
        torch.get_num_threads(),
        out.data_ptr(),
        stats.data_ptr(),
    )
    return out, stats


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
    rows = _readable(q, k, v, prefix_k, prefix_v)
    (grad_out,) = _readable(grad_out)
    C.prompt_attention_bwd(
        _pointers(rows, work),
        _numbers(rows, batch, num_prefixes),
        causal,
        scale,
        SCALARS[q.dtype],
        isa,
        torch.get_num_threads(),
        tuple(map(address, (grad_out, out, stats, *grads))),
        *grad_out.stride()[:2],
    )
    return grads


def backward_fake(grad_out, q, k, v, prefix_k, prefix_v, work, out, stats, batch, num_prefixes, causal, scale, needs):
    """Outputs of backward, unfilled."""
    inputs = (q, k, v, prefix_k, prefix_v)
    return tuple(x.new_empty(x.shape) if need else q.new_empty(0) for x, need in zip(inputs, needs))


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
    @once_differentiable
    def backward(ctx, grad_out, _):
        needs = ctx.needs_input_grad[:5]
        rest = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad_out is None:
            return (None,) * 5 + rest
        grads = torch.ops.pcl_ext.prompt_attention_backward.default(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
        return tuple(g if need else None for g, need in zip(grads, needs)) + rest


define(
    "prompt_attention_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor stats, {_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_fake,
)
define("prompt_attention", f"({_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)", forward, forward_fake, _PromptAttention)
