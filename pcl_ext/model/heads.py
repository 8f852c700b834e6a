"""Output layers, one per task and saved with it, and the loss of each kind of task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from pcl_ext.model.catalogue import SEEN_SCORE
from pcl_ext.task import TaskSpec

_CACHED = 1 << 15  # columns summed at a time where no gradient is taken


class TiedItemsHead(nn.Module):
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


class ItemsHead(nn.Module):
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
        # one dimension: there index_add runs in a fixed order
        scores.view(-1).index_add_(0, users * scores.shape[1] + columns.clamp_min(0), votes)
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

    @torch.no_grad()
    def fit(self, kind: str, target: Tensor) -> None:
        """Start at the base rates of targets [m]; those of a binary task may lie between 0 and 1."""
        if kind == "regression":
            deviation, mean = torch.std_mean(target.double(), correction=0)
            constant = target.min() == target.max()
            self.unit.copy_(torch.stack([mean, torch.where(constant, 1.0, deviation)]))
            return
        if kind == "binary":
            ones = target.double().sum()
            counts = torch.stack([len(target) - ones, ones])
        else:
            counts = torch.bincount(target.long(), minlength=self.linear.out_features).double()
        logs = (counts + 1.0).log()
        prior = logs - logs.mean()
        self.linear.bias.copy_(prior if kind == "classes" else (prior[1] - prior[0])[None])


def task_loss(spec: TaskSpec, output: Tensor, target: Tensor, target_row: Tensor) -> Tensor:
    """Mean loss over targets, in float32, or in float64 where the output is of it.

    output [b, C] (items, classes) or [b] (binary logits, regression values); target [m]: the column, the class, 0 / 1
    or the value; target_row [m]: the row of the output each belongs to. Without targets it is 0. A column below 0,
    which is none, makes the loss NaN. Raises TypeError or ValueError for targets of another shape; on the CPU, outside
    of compiled code and transforms such as vmap, also for columns, classes and flags that do not exist, and for items
    to learn that their history holds.
    """
    _check_targets(spec, output, target, target_row)
    if not len(target):
        return wide(output[:0]).sum()
    target_row = target_row.long()
    if spec.kind == "items":
        own = output[target_row, target.long()]
        _check_unseen(spec, output, own, target, target_row)
        losses = _logsumexp(output)[target_row] - wide(own)
        return losses.masked_fill(target < 0, torch.nan).mean()
    if spec.kind == "classes":
        return F.cross_entropy(wide(output[target_row]), target.long())
    output = wide(output[target_row])
    if spec.kind == "binary":
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
    return F.mse_loss(output, target.to(output.dtype))


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is of it: what losses are summed in."""
    return x if x.dtype == torch.float64 else x.float()


def _check_unseen(spec: TaskSpec, output: Tensor, own: Tensor, target: Tensor, target_row: Tensor) -> None:
    """Targets to learn, with scores own [m], are none of those that `Catalogue.rank_last` has put last."""
    if spec.repeats or not output.requires_grad or not _can_be_read(output):
        return
    last = max(SEEN_SCORE, torch.finfo(output.dtype).min) / 2  # half of it: bfloat16 rounds
    # a score of -inf is a mask of somebody else's
    if len(seen := ((own <= last) & own.isfinite() & (target >= 0)).nonzero()):
        raise ValueError(
            f"a target of {spec.name!r}, in row {int(target_row[seen[0, 0]])} of the output, is an item that its "
            f"history holds already, as are {len(seen)} of {len(own)} targets; these rank last: leave them out, or say "
            "TaskSpec(..., repeats=True)"
        )


def _can_be_read(tensor: Tensor) -> bool:
    """Whether its values may be looked at: CUDA would have to be waited for, traces and transforms refuse."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and peek_interpreter_stack() is None


def _logsumexp(output: Tensor) -> Tensor:
    """[b, C] -> [b], as `wide`. More columns than a cache holds are summed in parts; a gradient takes them at once."""
    if output.requires_grad or output.shape[1] <= _CACHED:
        return torch.logsumexp(wide(output), dim=1)
    return torch.stack([torch.logsumexp(wide(part), 1) for part in output.split(_CACHED, 1)]).logsumexp(0)


def _check_targets(spec: TaskSpec, output: Tensor, target: Tensor, target_row: Tensor) -> None:
    for name, value in (("target", target), ("target_row", target_row)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor [m], got {type(value).__name__}")
    if target.dim() != 1 or target.shape != target_row.shape:
        shapes = f"{list(target.shape)} and {list(target_row.shape)}"
        raise ValueError(f"target and target_row must both be [m], got {shapes}")
    if spec.kind == "classes" and target.is_floating_point():
        raise TypeError(f"targets of {spec.name!r} must be integers, got {target.dtype}")
    if target_row.is_floating_point() or target_row.dtype == torch.bool:
        raise TypeError(f"target_row must be integers, got {target_row.dtype}")
    if not _can_be_read(target) or not len(target):
        return
    low, high = (int(x) for x in target_row.aminmax())
    if not 0 <= low <= high < len(output):
        raise ValueError(f"target_row must be in 0..{len(output) - 1}, the rows of the output, got {low} to {high}")
    if spec.kind == "items" and (last := int(target.max())) >= output.shape[1]:
        raise ValueError(
            f"targets of {spec.name!r} must be columns of the output, below {output.shape[1]}, got {last}; "
            "task.columns(item_ids) gives them"
        )
    if spec.kind not in ("binary", "classes"):
        return
    top = 1 if spec.kind == "binary" else output.shape[1] - 1
    low, high = (float(x) for x in target.aminmax())
    if not 0 <= low <= high <= top:
        raise ValueError(f"targets of {spec.name!r} must be in 0..{top}, got {low:g} to {high:g}")
