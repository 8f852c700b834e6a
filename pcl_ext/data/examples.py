"""Examples: which users to look at, how far, and what to predict; all small tensors, histories stay on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """N inputs and their M targets.

    user            [N] int64, the user's row in the dataset
    cut             [N] int64, the first cut events of the history are visible
    target_offsets  [N + 1] int64; example i owns target[target_offsets[i] : target_offsets[i + 1]]
    target          [M] int64, or float32 for regression
    """

    user: Tensor
    cut: Tensor
    target_offsets: Tensor
    target: Tensor

    def __len__(self) -> int:
        return self.user.numel()

    @classmethod
    def without_targets(cls, user, cut) -> Examples:
        user, cut = (torch.from_numpy(np.asarray(values, np.int64)) for values in (user, cut))
        return cls(user, cut, torch.zeros(len(user) + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64))

    def select(self, rows: Tensor) -> Examples:
        """The examples at `rows` [m] int64, in that order."""
        index, offsets = self.target_rows(rows)
        return Examples(self.user[rows], self.cut[rows], offsets, self.target[index])

    def target_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in `target` of all targets of `rows`, in order, and the offsets [m + 1] of the rows in them."""
        begin = self.target_offsets[rows]
        counts = self.target_offsets[rows + 1] - begin
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = torch.repeat_interleave(begin - offsets[:-1], counts)
        return torch.arange(shift.numel()) + shift, offsets


def group_rows(user: np.ndarray, cut: np.ndarray, target: np.ndarray) -> Examples:
    """One example per distinct (user, cut), ordered; targets of an example keep their order."""
    if not ordered(user, cut):  # tables that `prepare` wrote are
        order = np.lexsort((cut, user))
        user, cut, target = user[order], cut[order], target[order]
    user, cut = user.astype(np.int64), cut.astype(np.int64)
    starts = np.flatnonzero(np.r_[True, (np.diff(user) != 0) | (np.diff(cut) != 0)]) if len(user) else np.arange(0)
    offsets = np.r_[starts, len(user)].astype(np.int64)
    return Examples(*(torch.from_numpy(values) for values in (user[starts], cut[starts], offsets, target)))


def ordered(user: np.ndarray, cut: np.ndarray) -> bool:
    """Whether rows are sorted by user, then cut."""
    same = user[1:] == user[:-1]
    return bool(((user[1:] > user[:-1]) | (same & (cut[1:] >= cut[:-1]))).all())


def user_chunks(offsets: np.ndarray, events: int, users: int = 1 << 62) -> Iterator[tuple[int, int]]:
    """(first user, end) of all users of `offsets` [N + 1], in order: at most `users` of them at a time, and `events`
    events, or one user."""
    start, count = 0, len(offsets) - 1
    while start < count:
        end = int(np.searchsorted(offsets, offsets[start] + events, side="right")) - 1
        end = min(max(end, start + 1), start + users, count)
        yield start, end
        start = end


def history_windows(user: np.ndarray, lengths: np.ndarray, max_len: int) -> Examples:
    """Cuts n, n - max_len, n - 2 max_len, .. above 1 of every user: together they cover each history once."""
    if max_len < 2:
        raise ValueError(f"max_len must be at least 2, got {max_len}")
    counts = np.where(lengths > 1, (lengths - 2) // max_len + 1, 0)
    first = np.cumsum(counts) - counts
    step = np.arange(counts.sum()) - np.repeat(first, counts)
    return Examples.without_targets(np.repeat(user, counts), np.repeat(lengths, counts) - step * max_len)
