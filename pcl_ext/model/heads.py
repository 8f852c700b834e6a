"""Output layers, one per task and saved with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcl_ext.model.catalogue import Catalogue
from pcl_ext.model.encoded import Encoded


class _RankingHead(nn.Module):
    """What the heads of items tasks share: a bias [C], and queries that are multiplied with rows of items."""

    bias: Tensor

    @torch.no_grad()
    def fit(self, kind: str, target: Tensor) -> None:
        """Start at the base rates of targets [m], columns of the catalogue; the kind is items."""
        counts = torch.bincount(target.long(), minlength=self.bias.numel()).double() + 1.0
        self.bias.copy_((counts / counts.mean()).log())


class TiedItemsHead(_RankingHead):
    """Scores items with the frozen item table through a zero-start residual projection: (f + A f) . e_c + b_c."""

    def __init__(self, num_features: int, dim: int, columns: int):
        super().__init__()
        self.project = nn.Linear(num_features, dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.bias = nn.Parameter(torch.zeros(columns))

    def queries(self, features: Tensor, newest: Tensor) -> Tensor:
        """features [b, F], newest [b, D] -> [b, D], to be multiplied with item rows."""
        return newest + self.project(features)


class ItemsHead(_RankingHead):
    """Scores items with rows of the task's own, A f . r_c + b_c, for a catalogue that the backbone need not know.

    table [C, width] and trained [C] bool: rows the backbone has trained start there, the others near zero.
    started [F] bool: A starts at zero but for these features, the task's own.
    """

    def __init__(self, table: Tensor, trained: Tensor, started: Tensor):
        super().__init__()
        self.project = nn.Linear(len(started), table.shape[1])
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        with torch.no_grad():
            self.project.weight *= started
        cold = torch.randn_like(table) * 0.02
        self.rows = nn.Parameter(torch.where(trained[:, None], table, cold))
        self.bias = nn.Parameter(torch.zeros(len(table)))

    def queries(self, features: Tensor, newest: Tensor) -> Tensor:
        """features [b, F], newest [b, D] (not read) -> [b, width], to be multiplied with item rows."""
        return self.project(features)

    @torch.no_grad()
    def start(self, rows: Tensor, bias: Tensor, features: Tensor) -> None:
        """Start at the scores f . rows_c + bias_c of some features [width] int64: rows [C, width], bias [C]."""
        self.project.weight.zero_()
        self.project.weight[torch.arange(len(features)), features] = 1.0
        self.rows.copy_(rows)
        self.bias.copy_(bias)


class RepeatScores(nn.Module):
    """For targets that may be items seen before: each row of a history votes for its own item with w . state + b.

    Starts at zero: no votes.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.vote = nn.Linear(dim, 1)
        nn.init.zeros_(self.vote.weight)
        nn.init.zeros_(self.vote.bias)

    def forward(self, scores: Tensor, states: Tensor, users: Tensor, columns: Tensor) -> Tensor:
        """Add to scores [B, C], in place; of each history row: states [T, D], users [T], columns [T] (-1: not in the
        catalogue)."""
        votes = torch.where(columns >= 0, self.vote(states)[:, 0].to(scores.dtype), 0.0)
        # of one dimension index_add runs in a fixed order on the CPU
        scores.view(-1).index_add_(0, users * scores.shape[1] + columns.clamp_min(0), votes)
        return scores

    def add_votes(self, scores: Tensor, encoded: Encoded, ranked: Catalogue, first: int) -> Tensor:
        """Add to scores [B, c] of the columns from `first` on, in place, the votes of all rows of the histories."""
        for piece in encoded.pieces:
            columns = ranked.among(piece.items, first, scores.shape[1])
            scores = self(scores, piece.states[-1], piece.users(), columns)
        return scores


class LabelHead(nn.Module):
    """A linear layer; one column for binary and regression, C for classes.

    unit [2]: mean and standard deviation of a regression target, measured on the training data; 1 for a constant.
    """

    unit: Tensor

    def __init__(self, num_features: int, columns: int):
        super().__init__()
        self.register_buffer("unit", torch.tensor([0.0, 1.0]))
        self.linear = nn.Linear(num_features, columns)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[b, F] -> [b, columns]."""
        return self.linear(features)

    def answer(self, kind: str, features: Tensor) -> Tensor:
        """[b, F] -> [b, C] logits of the classes, or [b]: a logit, or a value in the unit of the targets."""
        output = self(features)
        return output if kind == "classes" else output[:, 0] * self.unit[1] + self.unit[0]

    @torch.no_grad()
    def fit(self, kind: str, target: Tensor) -> None:
        """Start at the base rates of targets [m]; those of a binary task may lie between 0 and 1. ValueError where the
        unit of a regression is none in the head's dtype."""
        if kind == "regression":
            deviation, mean = torch.std_mean(target.double(), correction=0)
            constant = target.min() == target.max()
            unit = torch.stack([mean, torch.where(constant, 1.0, deviation)]).to(self.unit.dtype)
            if not (bool(unit.isfinite().all()) and unit[1] > 0):
                raise ValueError(
                    f"targets must have a mean and a deviation that {unit.dtype} holds, got {float(mean):g} and "
                    f"{float(deviation):g}; give them in another unit"
                )
            self.unit.copy_(unit)
            return
        if kind == "binary":
            ones = target.double().sum()
            counts = torch.stack([len(target) - ones, ones])
        else:
            counts = torch.bincount(target.long(), minlength=self.linear.out_features).double()
        logs = (counts + 1.0).log()
        prior = logs - logs.mean()
        self.linear.bias.copy_(prior if kind == "classes" else (prior[1] - prior[0])[None])
