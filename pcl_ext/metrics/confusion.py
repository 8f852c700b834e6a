"""Accuracy and macro-F1 with their standard errors, from counts of (target, predicted) pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Confusion:
    """Counts of (target, predicted). A row whose best logit is shared by t classes counts 1/t for each: the tie rule.

    Kept as integers apart for every t, so that the order of the rows does not matter; only cells that occur.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.cells: dict[int, tuple[Tensor, Tensor]] = {}  # by t: target * C + predicted, rising, and how often

    def add(self, logits: Tensor, target: Tensor) -> None:
        """logits [m, C], target [m] in 0..C-1."""
        best = logits == logits.amax(1, keepdim=True)
        ties = best.sum(1)
        for t in ties.unique().tolist():
            row, predicted = best[ties == t].nonzero(as_tuple=True)
            more = (target[ties == t][row].long() * self.num_classes + predicted).unique(return_counts=True)
            self.cells[t] = _merged(self.cells[t], more) if t in self.cells else more

    def expected(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Target, predicted and share (float64) of each cell, and the number of rows."""
        order = sorted(self.cells)
        number = sum(int(self.cells[t][1].sum()) // t for t in order)
        cell, place = torch.cat([self.cells[t][0] for t in order]).unique(return_inverse=True)
        count = torch.cat([self.cells[t][1].double() / t for t in order])
        share = count.new_zeros(len(cell)).index_add_(0, place, count) / number
        return cell // self.num_classes, cell % self.num_classes, share, number

    def hits(self, t: int) -> int:
        """Rows with t best classes of which one is the target."""
        cell, count = self.cells[t]
        return int(count[cell // self.num_classes == cell % self.num_classes].sum())

    def accuracy(self) -> float:
        return sum(self.hits(t) / t for t in sorted(self.cells)) / self.expected()[-1]

    def accuracy_error(self) -> float:
        number = self.expected()[-1]
        if number < 2:
            return math.nan
        squares = sum(self.hits(t) / t**2 for t in sorted(self.cells))
        return math.sqrt(max(squares / number - self.accuracy() ** 2, 0.0) / (number - 1))

    def macro_f1(self) -> float:
        """Mean over the classes that are a target or a prediction somewhere."""
        right, size = self._classes()
        return float((2 * right / size)[size > 0].mean())

    def macro_f1_error(self) -> float:
        """Delta method over the multinomial of the cells (Takahashi et al. 2022)."""
        target, predicted, share, number = self.expected()
        if number < 2:
            return math.nan
        right, size = self._classes()
        seen = size > 0
        slope = torch.where(seen, 2 * right / size.square(), 0.0)
        gradient = torch.where(target == predicted, 2 / size[target], 0.0) - slope[target] - slope[predicted]
        mean = (share * gradient).sum()
        variance = (share * gradient.square()).sum() - mean.square()
        return math.sqrt(max(float(variance), 0.0) / (number - 1)) / int(seen.sum())

    def _classes(self) -> tuple[Tensor, Tensor]:
        """By class, shares of all rows: rightly predicted; as a target and as a prediction together."""
        target, predicted, share, _ = self.expected()
        zeros = share.new_zeros(self.num_classes)
        right = zeros.index_add(0, target, torch.where(target == predicted, share, 0.0))
        return right, zeros.index_add(0, target, share).index_add_(0, predicted, share)


def _merged(known: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cell, place = torch.cat([known[0], more[0]]).unique(return_inverse=True)
    count = torch.cat([known[1], more[1]])
    return cell, count.new_zeros(len(cell)).index_add_(0, place, count)
