"""How many items score above a target, and how many the same: all that rank metrics need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 15  # scores compared at a time: they stay in the cache
_NARROW = 1 << 10  # columns up to which many rows at once are faster
_ELSEWHERE = 1 << 26  # scores compared at a time on another device, where they lie


def count_above(scores: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """scores [b, C], target [m] columns, rows [m] -> items above each target, items equal to it (itself among them).

    Both [m] int64 on the CPU, where wide rows are counted by numpy, several times as fast as torch sums flags.
    """
    if not scores.is_cpu:
        return _count_many_rows(scores, target, rows, _ELSEWHERE)
    if scores.shape[1] <= _NARROW:
        return _count_many_rows(scores, target, rows, _BLOCK)
    values = (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy()  # numpy has no bfloat16
    counts = np.zeros((2, len(target)), dtype=np.int64)
    for place, (row, column) in enumerate(zip(rows.tolist(), target.tolist())):
        line, own = values[row], values[row, column]
        for first in range(0, len(line), _BLOCK):
            block = line[first : first + _BLOCK]
            counts[:, place] += np.count_nonzero(block > own), np.count_nonzero(block == own)
    return tuple(torch.from_numpy(counts))


def _count_many_rows(scores: Tensor, target: Tensor, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    above, equal = torch.empty(2, len(target), dtype=torch.int64)
    for part in torch.arange(len(target)).split(max(1, most // max(1, scores.shape[1]))):
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
