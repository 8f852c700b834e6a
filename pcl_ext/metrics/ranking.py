"""How many items score above a target, and how many the same: all that rank metrics need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 15  # scores compared at a time: they stay in the cache
_NARROW = 1 << 10  # columns up to which many rows at once are faster


def count_above(scores: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """scores [b, C], target [m] columns, rows [m] -> items above each target, items equal to it (itself among them).

    Both [m] int64 on the CPU. Wide rows are counted by numpy, several times as fast as torch sums flags.
    """
    if scores.shape[1] <= _NARROW:
        return _count_in_narrow_rows(scores, target, rows)
    values = scores.cpu()
    values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    counts = np.zeros((2, len(target)), dtype=np.int64)
    for place, (row, column) in enumerate(zip(rows.tolist(), target.tolist())):
        line, own = values[row], values[row, column]
        for first in range(0, len(line), _BLOCK):
            block = line[first : first + _BLOCK]
            counts[:, place] += np.count_nonzero(block > own), np.count_nonzero(block == own)
    return tuple(torch.from_numpy(counts))


def _count_in_narrow_rows(scores: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    above, equal = torch.empty(2, len(target), dtype=torch.int64)
    for part in torch.arange(len(target)).split(max(1, _BLOCK // max(1, scores.shape[1]))):
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
