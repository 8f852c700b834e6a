"""plan_batches: rows grouped into batches of nearly equal size."""

import torch
from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import check_count, check_tensor
from pcl_ext.ops._native import CPU, C, use_fused


def plan_batches(lengths: Tensor, max_tokens: int, *, seed: int = 0, impl: str = "auto") -> list[Tensor]:
    """Group the row numbers of lengths [N] int64 into batches of at most max_tokens packed rows: a list of [n] int64.

    A history longer than max_tokens is a batch alone; an empty one counts as one packed row. Every row is in one batch,
    the batches are nearly equally full, and rows and batches are shuffled by seed: the same arguments, the same list.
    """
    check_tensor("lengths", lengths, 1, (torch.int64,))
    if lengths.device.type != "cpu":
        raise ValueError(f"lengths must be on the cpu, got {lengths.device}")
    max_tokens = min(check_count("max_tokens", max_tokens, 1), 2**62)  # more would not fit int64
    seed = check_count("seed", seed)
    if len(lengths) == 0:
        return []
    if lengths.min() < 0:
        raise ValueError(f"lengths must be at least 0, got {int(lengths.min())} at index {int(lengths.argmin())}")
    assign = _assign if use_fused(impl, lengths, cpu=()) else reference.plan_batches
    generator = torch.Generator(CPU).manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator, device=CPU)
    cost = lengths.clamp(min=1)
    order = shuffled[torch.argsort(cost[shuffled], descending=True, stable=True)]
    alone = int((cost > max_tokens).sum())
    batches = [order[i : i + 1] for i in range(alone)] + _fill(assign, cost, order[alone:], max_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator, device=CPU).tolist()]


def _fill(assign, cost: Tensor, order: Tensor, max_tokens: int) -> list[Tensor]:
    """Batches of the rows order [n], costliest first: as few as fit when each row goes to the emptiest one."""
    if len(order) == 0:
        return []
    costs = cost[order]
    num_bins = max(-(-int(costs.sum()) // max_tokens), int((2 * costs > max_tokens).sum()), 1)
    while (bins := assign(costs, max_tokens, num_bins)) is None:
        num_bins += max(1, num_bins // 100)
    return list(order[torch.argsort(bins, stable=True)].split(torch.bincount(bins).tolist()))


def _assign(costs: Tensor, capacity: int, num_bins: int) -> Tensor | None:
    """reference.plan_batches by the compiled module."""
    bins = torch.empty_like(costs)
    fits = C.plan_batches(costs.data_ptr(), len(costs), capacity, num_bins, bins.data_ptr())
    return bins if fits else None
