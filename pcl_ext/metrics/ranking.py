"""How many items score above a target, and how many the same: one pass over the scores, all that rank metrics need."""

from __future__ import annotations

import torch
from torch import Tensor

Exclude = tuple[Tensor, Tensor] | None

_WIDTH = 2040  # columns at a time: 255 words of eight flags, so that a byte of a word counts to 255 at most
_TARGETS = 512  # targets at a time: [512, 2040] float32 stay in the cache


def count_above(
    scores: Tensor, target: Tensor, rows: Tensor, exclude: Exclude, task: str, seen: int
) -> tuple[Tensor, Tensor]:
    """scores [b, C], target [m] columns, rows [m] -> items above each target, items equal to it.

    Both [m] int64 on the CPU; the target is one of the equal ones. Filtered items (`exclude`) count as neither.
    """
    keys = None if exclude is None else _keys(exclude, scores, task)
    check_scores(scores, keys, task, seen)
    above = torch.empty(len(target), dtype=torch.int64)
    equal = torch.empty_like(above)
    for part in torch.arange(len(target), device=scores.device).split(_TARGETS):
        row, own = rows[part], scores[rows[part], target[part]][:, None]
        in_order = torch.equal(row, part) and len(scores) == len(target)
        # One target a row, in order, needs no copy of the rows.
        block = scores[int(part[0]) : int(part[-1]) + 1] if in_order else scores
        higher = torch.zeros(len(part), dtype=torch.int64, device=scores.device)
        not_lower = torch.zeros_like(higher)
        for columns in block.split(_WIDTH, 1):
            columns = columns if in_order else columns[row]
            higher += _count(columns > own)
            not_lower += _count(columns >= own)
        if keys is not None:
            more, same = _filtered(scores, keys, target[part], row, task)
            not_lower -= more + same
            higher -= more
        above[part.cpu()], equal[part.cpu()] = higher.cpu(), (not_lower - higher).cpu()
    return above, equal


def _count(flags: Tensor) -> Tensor:
    """flags [m, c] bool, c <= 2040 -> true ones [m]."""
    if flags.shape[1] % 8 or not flags.shape[1]:
        return flags.sum(1)
    # Eight flags a word: summing bools one by one takes eight times as long.
    return flags.contiguous().view(torch.int64).sum(1, keepdim=True).view(torch.uint8).sum(1)


def check_scores(scores: Tensor, keys: Tensor | None, task: str, seen: int) -> None:
    """Raise for a NaN or infinite score; -inf passes where `keys` (sorted, row * C + column) filters it."""
    # The sum of a row is finite only if all of it is; the exact look is for the rest.
    wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else None
    if scores.sum(dtype=wide).isfinite():
        return
    bad = ~scores.isfinite()
    if keys is not None:
        flat = bad.view(-1) if bad.is_contiguous() else bad.reshape(-1)
        flat[keys] &= scores[keys // scores.shape[1], keys % scores.shape[1]] != -torch.inf
        bad = flat.view(scores.shape)
    if bad.any():
        where = bad.nonzero()[0]
        row, value = int(where[0]), scores[tuple(where)].item()
        column = f", column {int(where[1])}" if len(where) > 1 else ""
        raise ValueError(
            f"scores of task {task!r} must be finite, got {value} in row {row} of the batch (row {seen + row} in all)"
            f"{column}; -inf may only mark items given as exclude"
        )


def _keys(exclude: tuple[Tensor, Tensor], scores: Tensor, task: str) -> Tensor:
    """(rows [e], columns [e]) -> row * C + column, sorted, each once."""
    for values, end, what in zip(exclude, scores.shape, ("rows", "columns"), strict=True):
        if values.dtype != torch.int64 or values.shape != exclude[0].shape or values.dim() != 1:
            got = f"{values.dtype} {tuple(values.shape)}"
            raise ValueError(f"exclude of task {task!r} must be two int64 tensors [e], got {what} {got}")
        if len(values) and not (0 <= int(values.min()) and int(values.max()) < end):
            got = f"{int(values.min())}..{int(values.max())}"
            raise ValueError(f"exclude of task {task!r} must have {what} in 0..{end - 1}, got {got}")
    rows, columns = (values.to(scores.device) for values in exclude)
    return (rows * scores.shape[1] + columns).unique()


def _filtered(scores: Tensor, keys: Tensor, target: Tensor, row: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """How many filtered items of each target's row score above it, and the same [m]."""
    width = scores.shape[1]
    own = torch.isin(row * width + target, keys)
    if own.any():
        first = int(own.nonzero()[0])
        raise ValueError(
            f"exclude of task {task!r} must not hold a target, got target {int(target[first])} of row {int(row[first])}"
        )
    start, stop = (torch.searchsorted(keys // width, row, right=right) for right in (False, True))
    which = torch.repeat_interleave(torch.arange(len(row), device=row.device), stop - start)  # target of each pair
    begin = (stop - start).cumsum(0) - (stop - start)
    pair = keys[torch.arange(len(which), device=row.device) - begin[which] + start[which]]
    value, mine = scores[pair // width, pair % width], scores[row, target][which]
    return tuple(torch.bincount(which[flag], minlength=len(row)) for flag in (value > mine, value == mine))
