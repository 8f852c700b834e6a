"""How many items score above a target, and how many the same: all that rank metrics need."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 17  # scores compared at a time: they stay in the cache


def count_above(scores: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """scores [b, C], target [m] columns, rows [m] -> items above each target, items equal to it (itself among them).

    Both [m] int64 on the CPU.
    """
    above, equal = torch.empty(2, len(target), dtype=torch.int64)
    for part in torch.arange(len(target)).split(max(1, _BLOCK // scores.shape[1])):
        block = scores[rows[part]]
        own = block.gather(1, target[part][:, None])
        above[part], equal[part] = (block > own).sum(1).cpu(), (block == own).sum(1).cpu()
    return above, equal


def check_scores(scores: Tensor, task: str, seen: int) -> None:
    """Raise for a NaN or infinite score; `seen` rows came in earlier batches."""
    if not scores.numel() or all(extreme.isfinite() for extreme in scores.aminmax()):
        return
    where = (~scores.isfinite()).nonzero()[0]
    row, value = int(where[0]), scores[tuple(where)].item()
    place = f"row {row} of the batch (row {seen + row} in all)"
    if len(where) > 1:
        place += f", column {int(where[1])}"
    raise ValueError(f"scores of task {task!r} must be finite, got {value} in {place}")
