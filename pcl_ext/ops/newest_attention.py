"""newest_attention: the newest row of each history attends; what prompt_attention gives it, without the other rows."""

import torch
from torch import Tensor

from pcl_ext.ops import prompt_attention_op, reference
from pcl_ext.ops._check import FLOATS, autocast, check_like, check_shape, check_tensor, reads_values
from pcl_ext.ops._gpu import runs_cuda
from pcl_ext.ops._native import call
from pcl_ext.ops.attention_plan import check_layout, check_values, resolve_prefix_index, work_list
from pcl_ext.ops.prompt_attention import check_head_width, check_prefix, prompt_attention, use_fused_width


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
    impl: str = "auto",
) -> Tensor:
    """q [m, H, d] of the newest rows of the m histories that are not empty, k, v [T, H, d] of all -> [m, H, d].

    offsets [B + 1] and the prefix as in `prompt_attention`, whose newest rows these are up to rounding. Without a
    gradient or a prefix O(T + M) is done; where a gradient is asked for through a prefix, and with a prefix on CUDA, as
    much as prompt_attention does. Raises ValueError or TypeError naming what is wrong. On CUDA m is taken from q: how
    many histories are empty is not looked at.
    """
    q, k, v, prefix_k, prefix_v = autocast(q, k, v, prefix_k, prefix_v)
    check_tensor("q", q, 3, FLOATS)
    check_head_width(q)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, 3)
        check_like(name, value, "q", q)
        check_shape(name, value, (k.shape[0], *q.shape[1:]), "[T, H, d]")
    check_layout(offsets, prefix_offsets, prefix_index, "q", q)
    check_prefix(q, prefix_k, prefix_v, prefix_offsets, prefix_index)
    index = resolve_prefix_index(offsets, prefix_offsets, prefix_index)
    if reads_values(offsets) and not runs_cuda(q):
        check_values(offsets, prefix_offsets, index, len(k), 0 if prefix_k is None else len(prefix_k), "len(k)")
    filled, starts, newest = _filled(q, k, offsets)
    fused = use_fused_width(impl, q)
    if prefix_k is None:
        if not fused:
            return reference.newest_attention(q, k, v, offsets)
        return _own_history(q, k, v, starts, newest)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, prefix_k, prefix_v))
    if not fused:
        return reference.newest_attention(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, index)
    if wants or runs_cuda(q):
        rows = q.new_zeros(k.shape).index_copy(0, newest, q)
        shared = (prefix_k, prefix_v, prefix_offsets, index)
        return prompt_attention(rows, k, v, offsets, *shared, impl=impl).index_select(0, newest)
    # the prefix and the newest row in one softmax, the rows between in another; then both become one
    with_prefix = _single_rows(
        q,
        k.index_select(0, newest),
        v.index_select(0, newest),
        prefix_k,
        prefix_v,
        prefix_offsets,
        index.index_select(0, filled),
    )
    before = torch.maximum(newest - 1, starts)
    between = _single_rows(
        q, k.index_select(0, before), v.index_select(0, before), k, v, *_parts(starts, before, k.shape[0])
    )
    return _merged(with_prefix, between, newest > starts)


def _filled(q: Tensor, k: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which histories are not empty, where they begin, and their newest rows, [m] each; m must fit q [m, H, d]."""
    holds = offsets.diff() > 0
    if runs_cuda(q):
        check_shape("q", q, (min(len(q), len(holds), len(k)), *q.shape[1:]), "[m, H, d], m at most B and T")
        filled = torch.nonzero_static(holds, size=len(q))[:, 0].clamp_min(0)
        begin, end = (part.index_select(0, filled).clamp(0, len(k)) for part in (offsets[:-1], offsets[1:]))
        return filled, begin, (end - 1).clamp_min(0)
    filled = holds.nonzero()[:, 0]
    check_shape("q", q, (len(filled), *q.shape[1:]), "[m, H, d], m histories that are not empty")
    return filled, offsets[:-1].index_select(0, filled), offsets[1:].index_select(0, filled) - 1


def _own_history(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, newest: Tensor) -> Tensor:
    """No prefix: what lies before a newest row is its prefix."""
    own = torch.arange(len(newest) + 1, device=newest.device)
    offsets, index = _parts(starts, newest, k.shape[0])
    rows = (k.index_select(0, newest), v.index_select(0, newest))
    return prompt_attention(q, *rows, own, k, v, offsets, index, impl="fused")


def _parts(starts: Tensor, ends: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Histories cut in two at `ends` [m]: offsets [2 m + 1] of the parts, and the first part's place [m]."""
    offsets = torch.cat([torch.stack([starts, ends], 1).flatten(), starts.new_full((1,), total)])
    return offsets, 2 * torch.arange(len(starts), device=starts.device)


def _single_rows(q, k, v, prefix_k, prefix_v, prefix_offsets, index) -> tuple[Tensor, Tensor]:
    """Histories of one row each: what they find [m, H, d], and its largest score and one over its sum [m, H, 2]."""
    offsets = torch.arange(len(q) + 1, device=q.device)
    work = work_list(offsets, prefix_offsets, index, len(q), len(prefix_k))
    inputs = (q, k, v, prefix_k, prefix_v, work, len(q), len(prefix_offsets) - 1, True, q.shape[2] ** -0.5)
    return call(torch.ops.pcl_ext.prompt_attention.default, prompt_attention_op.forward, *inputs)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], counts: Tensor) -> Tensor:
    """Two softmaxes over different rows as one over all of them; `other` counts for some histories only."""
    (rows, stats), (more, more_stats) = one, other
    highest = torch.where(counts[:, None], torch.maximum(stats[..., 0], more_stats[..., 0]), stats[..., 0])
    weight = (stats[..., 0] - highest).exp() / stats[..., 1]
    added = torch.where(counts[:, None], (more_stats[..., 0] - highest).exp() / more_stats[..., 1], 0.0)
    share = (added / (weight + added))[..., None]
    both = (1 - share) * rows + share * more  # in the dtype of the sums; rows + share * (more - rows) would cancel
    return torch.where(counts[:, None, None], both.to(rows.dtype), rows)
