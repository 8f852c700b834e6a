"""Catalogue: which items an items task ranks, where they lie in its output, and which of them come last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcl_ext.model.encoded import Encoded
from pcl_ext.task import TaskSpec

SEEN_SCORE = -1e9  # finite, so that a ranking of everything stays possible; float16 has its lowest number instead


class Catalogue(nn.Module):
    """The items of an items task. It follows from the task and the backbone, so nothing of it is saved.

    items      [C] int64, in column order
    column_of  [V + 1] int64, the column of each id; -1 for what is not listed
    """

    items: Tensor
    column_of: Tensor

    def __init__(self, spec: TaskSpec, num_items: int):
        super().__init__()
        self.name, self.is_all = spec.name, spec.catalogue is None
        columns = spec.num_outputs(num_items)
        ids = range(1, columns + 1) if spec.catalogue is None else spec.catalogue
        self.register_buffer("items", torch.tensor(list(ids), dtype=torch.int64), persistent=False)
        if int(self.items.max()) > num_items:
            raise ValueError(
                f"catalogue of task {spec.name!r} names item {int(self.items.max())}, the backbone knows "
                f"items 1..{num_items}"
            )
        column_of = torch.full((num_items + 1,), -1, dtype=torch.int64)
        column_of[self.items] = torch.arange(columns)
        self.register_buffer("column_of", column_of, persistent=False)

    def __len__(self) -> int:
        return len(self.items)

    def columns(self, target: Tensor) -> Tensor:
        """Item ids [m] of any integer dtype -> their columns int64, -1 for what is not listed: on the CPU that raises
        ValueError, on CUDA, where nobody looks, `task_loss` is NaN."""
        if not isinstance(target, Tensor):
            raise TypeError(f"targets of task {self.name!r} must be a Tensor [m] of ids, got {type(target).__name__}")
        if target.is_floating_point():
            raise TypeError(f"targets of task {self.name!r} must be item ids, integers, got {target.dtype}")
        target = target.long()
        known = (target >= 1) & (target < len(self.column_of))
        columns = self.column_of[torch.where(known, target, 0)]  # an index below 0 would count from the end
        if columns.is_cpu and bool((columns < 0).any()):
            item = int(target[columns < 0][0])
            raise ValueError(f"targets of task {self.name!r} must be in its catalogue, got item {item}")
        return columns

    def rows_of(self, table: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """table [V + 1, D] -> [c, D], its rows of the columns first .. last; a view where all items are ranked."""
        return table[1:][first:last] if self.is_all else table[self.items[first:last]]

    def among(self, items: Tensor, first: int, count: int) -> Tensor:
        """items [T] -> their columns counted from `first`, -1 for those that are not among these `count`."""
        columns = self.column_of[items] - first
        return columns.masked_fill((columns < 0) | (columns >= count), -1)

    def rank_last(self, scores: Tensor, encoded: Encoded, first: int, score: float = SEEN_SCORE) -> Tensor:
        """scores [B, c] of the columns from `first` on -> the same tensor, with `score` for what a history holds."""
        users, items = encoded.seen()
        columns = self.among(items, first, scores.shape[1])
        seen = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        seen.index_put_((users, columns), seen.new_ones(()))  # column -1: what is not in the catalogue
        if score != -torch.inf:
            score = max(score, torch.finfo(scores.dtype).min)
        return scores.masked_fill_(seen[:, :-1], score)
