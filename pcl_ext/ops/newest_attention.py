"""newest_attention: the newest row of each history attends; what prompt_attention gives it, without the other rows."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pcl_ext.ops import prompt_attention_op, reference
from pcl_ext.ops._check import FLOATS, autocast, check_like, check_shape, check_tensor, is_plain, reads_values
from pcl_ext.ops._gpu import runs_cuda
from pcl_ext.ops._native import call, may_want_gradient
from pcl_ext.ops.attention_plan import AttentionPlan, check_layout, check_values, resolve_prefix_index, work_list
from pcl_ext.ops.prompt_attention import (
    check_head_width,
    check_plan,
    check_prefix,
    fits_plan,
    is_of,
    prompt_attention,
    use_fused_width,
)


def newest_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_offsets: Tensor | None = None,
    prefix_index: Tensor | None = None,
    *,
    plan: AttentionPlan | None = None,
    impl: str = "auto",
) -> Tensor:
    """q [m, H, d] of the newest rows of the m histories that are not empty, k, v [T, H, d] of all -> [m, H, d].

    offsets [B + 1], the prefix and plan as in `prompt_attention`, whose newest rows these are: bit for bit on the CPU
    where no gradient is asked for, else up to rounding. Without a gradient or a prefix O(T + M) is done; where a
    gradient is asked for through a prefix, and with a prefix on CUDA, as much as prompt_attention does. Raises
    ValueError or TypeError naming what is wrong. On CUDA m is taken from q: how many histories are empty is not looked
    at.
    """
    q, k, v, prefix_k, prefix_v = autocast(q, k, v, prefix_k, prefix_v)
    layout = (offsets, prefix_offsets, prefix_index)
    if not (fits_plan(k, k, v, offsets, prefix_k, prefix_v, prefix_offsets, prefix_index, plan) and _fits(q, k)):
        _check(q, k, v, prefix_k, prefix_v, layout)
        if plan is not None:
            check_plan(plan, *layout, k, prefix_k, "k")
            if torch.compiler.is_compiling() and k.is_cpu and not is_of(plan, *layout):
                plan = None  # values could not be compared: it is made anew
    fused = use_fused_width(impl, q)
    rows = (q, k, v, prefix_k, prefix_v)
    alone = fused and not runs_cuda(q) and not _may_be_differentiated(*rows)
    if plan is None and reads_values(offsets) and not runs_cuda(q):
        _check_values(k, prefix_k, layout, alone)
    if alone:
        return _alone(rows, layout, plan)
    return _of_other_ops(rows, layout, plan, fused)


def _fits(q: Tensor, k: Tensor) -> bool:
    """Whether nothing but the number of rows of q can be wrong, next to a k that is right."""
    return is_plain(q, 3, (k.dtype,)) and q.shape[1:] == k.shape[1:]


def _check(q, k, v, prefix_k, prefix_v, layout) -> None:
    check_tensor("q", q, 3, FLOATS)
    check_head_width(q)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, 3)
        check_like(name, value, "q", q)
        check_shape(name, value, (k.shape[0], *q.shape[1:]), "[T, H, d]")
    check_layout(*layout, "q", q)
    check_prefix(q, prefix_k, prefix_v, *layout[1:])


def _check_values(k, prefix_k, layout, alone: bool) -> None:
    """What layout holds; where a work list will be made, which checks it too, no more than where offsets end."""
    offsets, prefix_offsets, _ = layout
    if alone and offsets[-1] == len(k):
        return
    prefix_total = 0 if prefix_k is None else len(prefix_k)
    check_values(offsets, prefix_offsets, resolve_prefix_index(*layout), len(k), prefix_total, "len(k)")


def _may_be_differentiated(*rows: Tensor | None) -> bool:
    """Whether a gradient may be asked for, or derivatives run forward."""
    forward = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return forward or may_want_gradient(*rows)


def _alone(rows, layout, plan: AttentionPlan | None) -> Tensor:
    """The newest rows and no others, by the CPU's kernel."""
    (q, k, _, prefix_k, _), (offsets, prefix_offsets, _) = rows, layout
    if plan is not None:
        work, batch, num_prefixes = plan.work, plan.batch, plan.num_prefixes
    else:
        work = work_list(*layout, len(k), 0 if prefix_k is None else len(prefix_k))
        batch, num_prefixes = len(offsets) - 1, 0 if prefix_offsets is None else len(prefix_offsets) - 1
    inputs = (*rows, work, batch, num_prefixes, q.shape[2] ** -0.5)
    return call(torch.ops.pcl_ext.newest_attention.default, prompt_attention_op.newest, *inputs)


def _of_other_ops(rows, layout, plan: AttentionPlan | None, fused: bool) -> Tensor:
    """Gradients and CUDA, for which there is no kernel of the newest rows alone: prompt_attention has them."""
    (q, k, v, prefix_k, prefix_v), (offsets, prefix_offsets, prefix_index) = rows, layout
    starts, newest = _filled(q, k, offsets)
    shared = (prefix_k, prefix_v, prefix_offsets, prefix_index)
    if not fused:
        return reference.newest_attention(q, k, v, offsets, *shared[:3], resolve_prefix_index(*layout))
    if prefix_k is None:
        return _own_history(q, k, v, starts, newest)
    every = q.new_zeros(k.shape).index_copy(0, newest, q)
    return prompt_attention(every, k, v, offsets, *shared, plan=plan, impl="fused").index_select(0, newest)


def _filled(q: Tensor, k: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Where the histories that are not empty begin, and their newest rows, [m] each; m must fit q [m, H, d]."""
    holds = offsets.diff() > 0
    if runs_cuda(q):
        check_shape("q", q, (min(len(q), len(holds), len(k)), *q.shape[1:]), "[m, H, d], m at most B and T")
        filled = torch.nonzero_static(holds, size=len(q))[:, 0].clamp_min(0)
        begin, end = (part.index_select(0, filled).clamp(0, len(k)) for part in (offsets[:-1], offsets[1:]))
        return begin, (end - 1).clamp_min(0)
    filled = holds.nonzero()[:, 0]
    prompt_attention_op.check_newest(q, len(filled))
    return offsets[:-1].index_select(0, filled), offsets[1:].index_select(0, filled) - 1


def _own_history(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, newest: Tensor) -> Tensor:
    """No prefix: what lies before a newest row is its prefix."""
    own = torch.arange(len(newest) + 1, device=newest.device)
    parts = torch.cat([torch.stack([starts, newest], 1).flatten(), starts.new_full((1,), k.shape[0])])  # [2 m + 1]
    before = 2 * torch.arange(len(starts), device=starts.device)
    rows = (k.index_select(0, newest), v.index_select(0, newest))
    return prompt_attention(q, *rows, own, k, v, parts, before, impl="fused")
