"""Metrics of one task, exact and streaming: the same bits whatever the batch size or the order of the batches.

Ties: a target's rank is the expected one under random tie-breaking, so a constant model gets HR@K = K/N exactly, AUC
1/2 and accuracy 1/C. Sums are correctly rounded (math.fsum) over per-row float64 values, or over integer counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pcl_ext.metrics.confusion import Confusion
from pcl_ext.metrics.ranking import check_scores, count_above
from pcl_ext.task import METRICS, TaskSpec


class TaskMetrics:
    """Metrics of one task over any number of batches; memory grows with the targets, not with the catalogue.

    items: full ranking over the C columns. binary, classes, regression: one row a target. See `update`.
    """

    def __init__(self, spec: TaskSpec):
        self.spec = spec
        self.count = 0  # targets seen
        self._rows = 0  # output rows seen
        self._kind = _KINDS[spec.kind](spec)

    def update(self, output: Tensor, target: Tensor, target_row: Tensor) -> None:
        """Add a batch.

        output      items: scores [b, C] over the catalogue's columns; classes: logits [b, C]; binary: logits [b] or
                    [b, 1]; regression: values [b] or [b, 1]. Floating point, any device
        target      [m] items: column 0..C-1; binary: 0 or 1; classes: 0..num_classes-1; regression: a value
        target_row  [m] int64, the row of `output` each target belongs to

        ValueError for a NaN or infinite score (names the task and the row), a target or row out of range.
        """
        output, target, rows = self._checked(output, target, target_row)
        check_scores(output, self.spec.name, self._rows)
        if self.spec.kind == "items":
            above, equal = count_above(output, target, rows)
            self._kind.add(above, equal, rows.cpu() + self._rows)
        else:
            self._kind.add(output[rows].cpu(), target.cpu())
        self.count += len(target)
        self._rows += len(output)

    def compute(self) -> dict[str, float]:
        """All metrics of the task's kind. AUC of a single class is undefined: it is left out, or ValueError where it is
        the task's own metric. ValueError also where there is no target yet."""
        if not self.count:
            raise ValueError(f"metrics of task {self.spec.name!r} need at least one target, got none")
        return self._kind.compute()

    def standard_error(self) -> dict[str, float]:
        """One standard error of each metric. items: targets of one output row count as one cluster; auc: DeLong;
        rmse and macro_f1: delta method. A metric is left out where too few rows leave nothing to estimate from."""
        if not self.count:
            raise ValueError(f"metrics of task {self.spec.name!r} need at least one target, got none")
        errors = self._kind.standard_error()
        return {metric: error for metric, error in errors.items() if not math.isnan(error)}

    def values(self, metric: str) -> Tensor:
        """items: the metric of every target, [m] float64 in the order they came; their mean is what `compute` says.
        ValueError for another kind or metric, and where there were no targets yet."""
        if self.spec.kind != "items":
            raise ValueError(f"values need a task of kind items, {self.spec.name!r} is {self.spec.kind}")
        if metric not in METRICS["items"]:
            raise ValueError(f"metric must be one of {', '.join(METRICS['items'])}, got {metric!r}")
        if not self.count:
            raise ValueError(f"task {self.spec.name!r} has no targets yet: update first")
        return self._kind.values(metric)

    def _checked(self, output: Tensor, target: Tensor, target_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        name, kind = self.spec.name, self.spec.kind
        for what, value in (("output", output), ("target", target), ("target_row", target_row)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{what} of task {name!r} must be a Tensor, got {type(value).__name__}")
        if not output.is_floating_point():
            raise TypeError(f"output of task {name!r} must be floating point, got {output.dtype}")
        if kind in ("binary", "regression") and output.dim() == 2 and output.shape[1] == 1:
            output = output[:, 0]
        dims = 2 if kind in ("items", "classes") else 1
        if output.dim() != dims:
            raise ValueError(f"output of task {name!r} ({kind}) must have {dims} dimensions, got {tuple(output.shape)}")
        if target.dim() != 1 or target.shape != target_row.shape:
            got = f"{tuple(target.shape)} and {tuple(target_row.shape)}"
            raise ValueError(f"target and target_row of task {name!r} must be [m] both, got {got}")
        rows = _integers(target_row, len(output), f"target_row of task {name!r}").to(output.device)
        if dims == 2:
            self._kind.check_width(output)
        if kind == "regression":
            _check_values(target, name)
        else:
            width = 2 if kind == "binary" else output.shape[1]
            target = _integers(target, width, f"target of task {name!r}")
        return output.detach(), target.detach().to(output.device), rows


class _Items:
    """Rank metrics from counts: `above` items score higher than the target, `equal` the same (the target is one)."""

    def __init__(self, spec: TaskSpec):
        self.spec = spec
        self.width: int | None = None if spec.catalogue is None else len(spec.catalogue)
        self.above: list[Tensor] = []
        self.equal: list[Tensor] = []
        self.row: list[Tensor] = []

    def check_width(self, output: Tensor) -> None:
        if self.width is None:
            self.width = output.shape[1]
        _same_width(self.spec, output, self.width)

    def add(self, above: Tensor, equal: Tensor, row: Tensor) -> None:
        self.above.append(above.to(torch.int32))
        self.equal.append(equal.to(torch.int32))
        self.row.append(row)

    def values(self, metric: str) -> Tensor:
        """Expected value per target [m] float64: the target's rank is uniform over above + 1 .. above + equal."""
        name, cutoff = metric.split("@")
        top = int(cutoff)
        above, equal = torch.cat(self.above).long(), torch.cat(self.equal).long()
        first, last = above.clamp(max=top), (above + equal).clamp(max=top)
        if name == "hr":
            return (last - first).double() / equal
        rank = torch.arange(1, top + 1, dtype=torch.float64)
        gain = 1 / rank if name == "mrr" else 1 / torch.log2(rank + 1)
        total = torch.cat([torch.zeros(1, dtype=torch.float64), gain.cumsum(0)])
        # A lone rank reads its gain itself: the difference of two sums would be off in the last bits.
        alone = torch.cat([gain, torch.zeros(1, dtype=torch.float64)])[first]
        return torch.where(equal == 1, alone, (total[last] - total[first]) / equal)

    def compute(self) -> dict[str, float]:
        return {metric: _mean(self.values(metric)) for metric in METRICS["items"]}

    def standard_error(self) -> dict[str, float]:
        _, cluster = torch.cat(self.row).unique(return_inverse=True)
        return {metric: self._clustered(self.values(metric), cluster) for metric in METRICS["items"]}

    @staticmethod
    def _clustered(values: Tensor, cluster: Tensor) -> float:
        clusters = int(cluster.max()) + 1
        if clusters < 2:
            return math.nan
        total = torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster, values - _mean(values))
        return math.sqrt(_sum(total.square()) * clusters / (clusters - 1)) / len(values)


class _Binary:
    """Logits and labels are kept: AUC needs all of them."""

    def __init__(self, spec: TaskSpec):
        self.spec = spec
        self.logit: list[Tensor] = []
        self.label: list[Tensor] = []
        self.confusion = Confusion(2)

    def add(self, logit: Tensor, label: Tensor) -> None:
        self.logit.append(logit)
        self.label.append(label.to(torch.uint8))
        self.confusion.add(torch.stack([torch.zeros_like(logit), logit], 1), label)

    def losses(self) -> Tensor:
        logit, label = torch.cat(self.logit).double(), torch.cat(self.label).double()
        return torch.nn.functional.softplus(torch.where(label > 0, -logit, logit), threshold=700)

    def compute(self) -> dict[str, float]:
        others = {"log_loss": _mean(self.losses()), "accuracy": self.confusion.accuracy()}
        positive, count = sum(int(label.sum()) for label in self.label), sum(map(len, self.label))
        if positive not in (0, count):
            return {"auc": self._auc()} | others
        if self.spec.metric == "auc":
            name, only = self.spec.name, int(positive > 0)
            raise ValueError(f"auc of task {name!r} needs targets of both classes, got {count} targets of {only}")
        return others

    def _auc(self) -> float:
        try:
            from torchmetrics.functional.classification import binary_auroc
        except ImportError as error:
            raise ImportError("auc needs torchmetrics: pip install '.[cli]' in the sources of pcl_ext") from error
        label, rank = self._ranks()  # binary_auroc takes a sigmoid of logits in float32, which ties all above 17
        return float(binary_auroc(rank.double() / len(rank), label.long(), validate_args=False))

    def _ranks(self) -> tuple[Tensor, Tensor]:
        """Labels bool and dense ranks of the logits, equal where these are, [m] each."""
        _, rank = torch.cat(self.logit).unique(return_inverse=True)
        return torch.cat(self.label).bool(), rank

    def standard_error(self) -> dict[str, float]:
        return {
            "auc": self._delong(),
            "log_loss": _standard_error(self.losses()),
            "accuracy": self.confusion.accuracy_error(),
        }

    def _delong(self) -> float:
        """DeLong, DeLong and Clarke-Pearson 1988: variance of the shares of negatives below each positive, and back."""
        label, rank = self._ranks()
        variance = 0.0
        for own, other in ((rank[label], rank[~label]), (rank[~label], rank[label])):
            if len(own) < 2 or not len(other):
                return math.nan
            count = torch.bincount(other, minlength=int(rank.max()) + 1).double()
            share = (count.cumsum(0) - count / 2)[own] / len(other)
            variance += _standard_error(share) ** 2
        return math.sqrt(variance)


class _Classes:
    def __init__(self, spec: TaskSpec):
        self.spec = spec
        self.confusion = Confusion(spec.num_classes)

    def check_width(self, output: Tensor) -> None:
        _same_width(self.spec, output, self.spec.num_classes)

    def add(self, logits: Tensor, target: Tensor) -> None:
        self.confusion.add(logits, target)

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.confusion.accuracy(), "macro_f1": self.confusion.macro_f1()}

    def standard_error(self) -> dict[str, float]:
        return {"accuracy": self.confusion.accuracy_error(), "macro_f1": self.confusion.macro_f1_error()}


class _Regression:
    def __init__(self, spec: TaskSpec):
        self.errors: list[Tensor] = []

    def add(self, value: Tensor, target: Tensor) -> None:
        self.errors.append(value.double() - target.double())

    def compute(self) -> dict[str, float]:
        errors = torch.cat(self.errors)
        return {"rmse": math.sqrt(_mean(errors.square())), "mae": _mean(errors.abs())}

    def standard_error(self) -> dict[str, float]:
        errors = torch.cat(self.errors)
        rmse = math.sqrt(_mean(errors.square()))
        squared = _standard_error(errors.square())
        return {"rmse": squared / (2 * rmse) if rmse else 0 * squared, "mae": _standard_error(errors.abs())}


_KINDS = {"items": _Items, "binary": _Binary, "classes": _Classes, "regression": _Regression}


def _sum(values: Tensor) -> float:
    """Correctly rounded, so that the order of the values does not matter."""
    return math.fsum(_numbers(values))


def _numbers(values: Tensor) -> Iterable[float]:
    for block in values[values != 0].split(65536):
        yield from block.tolist()


def _mean(values: Tensor) -> float:
    return _sum(values) / len(values)


def _standard_error(values: Tensor) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(_sum((values - _mean(values)).square()) / (len(values) - 1) / len(values))


def _same_width(spec: TaskSpec, output: Tensor, width: int) -> None:
    if output.shape[1] != width:
        raise ValueError(f"output of task {spec.name!r} must have {width} columns, got {output.shape[1]}")


def _integers(values: Tensor, end: int, what: str) -> Tensor:
    """values [m] as int64, each in 0..end-1."""
    if values.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        raise TypeError(f"{what} must be integers, got {values.dtype}")
    values = values.long()
    if len(values) and not (0 <= int(values.min()) and int(values.max()) < end):
        raise ValueError(f"{what} must be in 0..{end - 1}, got {int(values.min())}..{int(values.max())}")
    return values


def _check_values(target: Tensor, name: str) -> None:
    if not target.isfinite().all():
        raise ValueError(f"target of task {name!r} must be finite, got {target[~target.isfinite()][0].item()}")
