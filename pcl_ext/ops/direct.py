"""The CPU's kernels without the checks of each op, for a caller that asks `takes` once for all its tensors.

A small op costs as much for its checks as for its work: a request of one user feels that.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pcl_ext.ops import feed_forward_op, linear_op, prompt_attention_op
from pcl_ext.ops._check import ORDINARY, is_plain
from pcl_ext.ops._gpu import emulates
from pcl_ext.ops._native import is_unseen, needs_dispatch
from pcl_ext.ops.attention_plan import AttentionPlan
from pcl_ext.ops.newest_attention import newest_attention as checked_newest_attention
from pcl_ext.ops.prompt_attention import fits_plan, is_of
from pcl_ext.ops.prompt_attention import prompt_attention as checked_prompt_attention


def takes(
    rows: Tensor, weights: Iterable[Tensor], shapes: Sequence[tuple[int, ...]], prefix: Iterable[Tensor] = ()
) -> bool:
    """Whether ops of rows [T, D] with these weights would do no more than run the CPU's kernels on them as they are.

    They do where the weights have these shapes, the first of which ends with D, and the rows' dtype, in which sums are
    taken, all are contiguous and ordinary tensors of the CPU, none wants a gradient, and no autocast, compilation,
    transform, mode or trace is to see the ops. prefix: keys and values that will be attended to; their shapes and
    strides are looked at then.
    """
    if not (linear_op.PAYS and is_unseen() and is_plain(rows, 2, linear_op.SUMS) and rows.is_contiguous()):
        return False
    if rows.shape[1] != shapes[0][-1] or emulates() or torch.is_autocast_enabled("cpu") or needs_dispatch(rows):
        return False
    dtype, grad, strided = rows.dtype, torch.is_grad_enabled(), torch.strided
    for weight, shape in zip(weights, shapes, strict=True):
        if not (  # as is_plain and needs_dispatch say: their calls would be half of the time
            type(weight) in ORDINARY
            and weight.is_cpu
            and weight.dtype is dtype
            and weight.layout is strided
            and weight.shape == shape
            and weight.is_contiguous()
            and not (grad and weight.requires_grad)
            and not weight.is_neg()
            and not weight._is_zerotensor()
        ):
            return False
    for x in prefix:
        if not is_plain(x, None, (dtype,)) or needs_dispatch(x):
            return False
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, norm=(None, None), residual=None, eps: float = 1e-5) -> Tensor:
    """`ops.linear`."""
    return linear_op.fill(x.new_empty(x.shape[0], weight.shape[0]), x, weight, bias, *norm, residual, eps)


def feed_forward(x: Tensor, norm: tuple[Tensor, Tensor], *weights: Tensor, eps: float) -> Tensor:
    """`ops.feed_forward`."""
    return feed_forward_op.fill(x.new_empty(*x.shape), x, *norm, *weights, eps)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *prefix, plan: AttentionPlan) -> Tensor:
    """`ops.prompt_attention`, which says what is wrong where the tensors do not fit the plan."""
    if not _fits(k, v, offsets, prefix, plan):
        return checked_prompt_attention(q, k, v, offsets, *prefix, plan=plan)
    lists = (plan.work, plan.batch, plan.num_prefixes)
    return prompt_attention_op.output(q, k, v, *(prefix[:2] or (None, None)), *lists, True, q.shape[2] ** -0.5)[0]


def newest_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *prefix, plan: AttentionPlan) -> Tensor:
    """`ops.newest_attention`; as above."""
    if not _fits(k, v, offsets, prefix, plan):
        return checked_newest_attention(q, k, v, offsets, *prefix, plan=plan)
    lists = (plan.work, plan.batch, plan.num_prefixes)
    return prompt_attention_op.newest(q, k, v, *(prefix[:2] or (None, None)), *lists, q.shape[2] ** -0.5)


def _fits(k, v, offsets, prefix: tuple, plan) -> bool:
    if not prefix:
        return type(plan) is AttentionPlan and is_of(plan, offsets, None, None) and plan.total == k.shape[0]
    return fits_plan(k, k, v, offsets, *prefix, plan)
