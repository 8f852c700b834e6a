"""Accuracy and macro-F1 with their standard errors, from counts of (target, predicted) pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Confusion:
    """Counts [target, predicted]. A row whose best logit is shared by t classes counts 1/t for each: the tie rule.

    Kept as integers apart for every t, so that the order of the rows does not matter.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.counts: dict[int, Tensor] = {}

    def add(self, logits: Tensor, target: Tensor) -> None:
        """logits [m, C], target [m] in 0..C-1."""
        best = logits == logits.amax(1, keepdim=True)
        ties = best.sum(1)
        for t in ties.unique().tolist():
            row, predicted = best[ties == t].nonzero(as_tuple=True)
            cell = target[ties == t][row].long() * self.num_classes + predicted
            count = torch.bincount(cell, minlength=self.num_classes**2).view(self.num_classes, -1)
            self.counts[t] = self.counts.get(t, 0) + count

    def expected(self) -> tuple[Tensor, float]:
        """Shares [C, C] float64 of all rows, and the number of rows."""
        counts = sum(self.counts[t].double() / t for t in sorted(self.counts))
        number = sum(int(count.sum()) // t for t, count in self.counts.items())
        return counts / number, number

    def accuracy(self) -> float:
        hits = sum(int(self.counts[t].diagonal().sum()) / t for t in sorted(self.counts))
        return hits / self.expected()[1]

    def accuracy_error(self) -> float:
        number = self.expected()[1]
        if number < 2:
            return math.nan
        squares = sum(int(self.counts[t].diagonal().sum()) / t**2 for t in sorted(self.counts))
        return math.sqrt(max(squares / number - self.accuracy() ** 2, 0.0) / (number - 1))

    def macro_f1(self) -> float:
        """Mean over the classes that are a target or a prediction somewhere."""
        share, _ = self.expected()
        size = share.sum(0) + share.sum(1)
        return float((2 * share.diagonal() / size)[size > 0].mean())

    def macro_f1_error(self) -> float:
        """Delta method over the multinomial of the cells (Takahashi et al. 2022)."""
        share, number = self.expected()
        if number < 2:
            return math.nan
        size = share.sum(0) + share.sum(1)
        seen = size > 0
        slope = torch.where(seen, 2 * share.diagonal() / size.square(), 0.0)
        gradient = torch.diag(torch.where(seen, 2 / size, 0.0)) - slope[:, None] - slope[None, :]
        mean = (share * gradient).sum()
        variance = (share * gradient.square()).sum() - mean.square()
        return math.sqrt(max(float(variance), 0.0) / (number - 1)) / int(seen.sum())
