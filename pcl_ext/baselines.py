"""What a user model has to beat on a task: a constant (`trivial`), and a simple model that takes seconds (`cheap`).

Both are measured like any model: every example of the fold, full ranking over the catalogue, seen items not filtered,
ties by expected rank. Hyperparameters are picked on the valid fold. Where a dataset is large the cheap models learn
from a part of the train users, and those that rank items are measured on a part of the fold: their name says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pcl_ext import ops
from pcl_ext.data import Dataset, Examples
from pcl_ext.metrics import METRICS, TaskMetrics
from pcl_ext.progress import progress
from pcl_ext.task import TaskSpec

NEIGHBOURS = (50, 100, 200, 500)
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # C, the inverse weight of the L2 penalty
_MOST_NEIGHBOURS = 10_000  # train users a kNN looks at
_MOST_REGRESSION = 20_000  # train users a regression learns from
_MOST_VALID = 1_000
_MOST_WEIGHTS = 65_536  # items that all have a weight in a regression; of more items, those that its users have
_MOST_MEASURED = 2_000  # examples of the fold that items are ranked for: all of online-retail and ml-1m
_MOST_PAIRS = 20_000_000  # transitions a Markov chain counts
_MOST_ITEMS = 2048  # of a history, the newest
_SCORES = 1 << 22  # of a batch
_EXAMPLES = 1 << 14  # of a batch: what they read is held at a time
_MOST_SHARED = 1 << 22  # pairs of an item and a train user who has it that are held at a time
_SILENT = 1e-6  # popularity only orders what a model gives the same score
_LOWEST_RANK = max(int(metric.partition("@")[2]) for metric in METRICS["items"])  # that a metric tells from lower ones


def trivial(dataset: Dataset, task: str, fold: str = "test") -> dict[str, Any]:
    """The best constant -> {"name", "metrics"}: popularity, the train users' frequencies, or their mean.

    Popularity counts the targets of the train users.
    """
    spec, examples = dataset.task(task).spec, dataset.examples(task, fold)
    train = dataset.examples(task, "train").target
    if spec.kind == "items":
        popularity = _popularity(dataset, spec, train)
        return {"name": "popularity", "metrics": _measure_order(_by_column(dataset, spec, examples), spec, popularity)}
    if spec.kind == "regression":
        name, constant = "mean", train.double().mean()
    else:
        name = "majority"
        share = (torch.bincount(train, minlength=spec.num_classes or 2).double() + 1e-9) / len(train)
        constant = share.log() if spec.kind == "classes" else torch.logit(share[1], eps=1e-9)
    metrics = _measure(dataset, spec, examples, lambda rows: constant.expand(len(rows), *constant.shape))
    return {"name": name, "metrics": metrics}


def cheap(dataset: Dataset, task: str, fold: str = "test") -> dict[str, Any]:
    """The simple model of the task's kind -> {"name", "metrics"}.

    next: first-order Markov chain. Other items tasks: nearest train users by the cosine of their sets of items.
    Labels: logistic regression, and values: ridge regression, on the bag of items.
    """
    spec = dataset.task(task).spec
    if task == "next":
        model = Markov(dataset, spec)
    elif spec.kind == "items":
        model = NearestUsers(dataset, spec)
    else:
        model = BagOfItems(dataset, spec)
    examples, name = dataset.examples(task, fold), model.name
    if spec.kind == "items" and len(examples) > _MOST_MEASURED:
        name += f", measured on {_MOST_MEASURED:,} of {len(examples):,} {fold} examples"
        examples = _some(examples, _MOST_MEASURED)
    return {"name": name, "metrics": _measure(dataset, spec, examples, lambda rows: model(examples.select(rows)))}


def _measure(dataset: Dataset, spec: TaskSpec, examples: Examples, outputs) -> dict[str, float]:
    """Metrics of `outputs`: positions [b] in examples -> [b, C] or [b]."""
    return _measure_columns(_by_column(dataset, spec, examples), spec, outputs, spec.num_outputs(dataset.num_items))


def _measure_order(examples: Examples, spec: TaskSpec, scores: Tensor) -> dict[str, float]:
    """Metrics of the same scores [C] for everyone; targets are columns.

    A rank metric asks how many items score higher, down to the lowest rank that it knows, and how many the same. The
    items at the top say that, with one that stands for all below them: no row of scores is as wide as the catalogue.
    """
    top = scores >= scores.topk(min(_LOWEST_RANK, len(scores))).values[-1]
    column = torch.where(top, top.cumsum(0) - 1, top.sum())
    short = torch.cat([scores[top], scores.min()[None] - 1])
    examples, spec = replace(examples, target=column[examples.target]), replace(spec, catalogue=None)
    return _measure_columns(examples, spec, lambda rows: short.expand(len(rows), -1), len(short))


def _measure_columns(examples: Examples, spec: TaskSpec, outputs, width: int) -> dict[str, float]:
    """Metrics of `outputs` [b, width] or [b], some rows at a time; targets of items are columns."""
    metrics = TaskMetrics(spec)
    with progress(f"reference models of {spec.name}", len(examples), " examples") as bar:
        for rows in torch.arange(len(examples)).split(max(1, min(_EXAMPLES, _SCORES // width))):
            part = examples.select(rows)
            metrics.update(outputs(rows), part.target, _rows_of_targets(part))
            bar.update(len(rows))
    return metrics.compute()


def _by_column(dataset: Dataset, spec: TaskSpec, examples: Examples) -> Examples:
    """The examples, an item as its column in the task's catalogue; values and classes are what they are."""
    columns = _columns(dataset, spec)
    return examples if columns is None else replace(examples, target=columns[examples.target])


def _columns(dataset: Dataset, spec: TaskSpec) -> Tensor | None:
    """[V + 1] int64: the column of an item in the task's catalogue, -1 where it is not in it."""
    if spec.kind != "items":
        return None
    columns = torch.full((dataset.num_items + 1,), -1)
    catalogue = torch.arange(1, dataset.num_items + 1) if spec.catalogue is None else torch.tensor(spec.catalogue)
    columns[catalogue] = torch.arange(len(catalogue))
    return columns


def _popularity(dataset: Dataset, spec: TaskSpec, targets: Tensor) -> Tensor:
    """[C] float64: how often each item of the catalogue is a target."""
    return torch.bincount(_columns(dataset, spec)[targets], minlength=spec.num_outputs(dataset.num_items)).double()


def _some(examples: Examples, most: int) -> Examples:
    """At most `most` examples, chosen at random but always the same."""
    if len(examples) <= most:
        return examples
    rows = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:most].sort().values
    return examples.select(rows)


def _rows_of_targets(examples: Examples) -> Tensor:
    """[M] int64: which example each target belongs to."""
    return torch.repeat_interleave(torch.arange(len(examples)), examples.target_offsets.diff())


def _part(train: Examples, whole: Examples) -> str:
    """What a name says of a model that learned from `train`."""
    return f", learned from {len(train):,} of {len(whole):,} train users" if len(train) < len(whole) else ""


def _sets(dataset: Dataset, examples: Examples) -> tuple[Tensor, Tensor]:
    """Distinct visible items of each example, packed: items [t] int64, offsets [n + 1]."""
    items, offsets = ops.gather_histories(dataset.items, dataset.offsets, examples.user, _MOST_ITEMS, examples.cut)
    row = torch.repeat_interleave(torch.arange(len(examples)), offsets.diff())
    keys = torch.unique(row * (dataset.num_items + 1) + items)
    counts = torch.bincount(keys // (dataset.num_items + 1), minlength=len(examples))
    return keys % (dataset.num_items + 1), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Markov:
    """Counts of what followed the last item in the histories of train users; popularity where that is silent."""

    def __init__(self, dataset: Dataset, spec: TaskSpec):
        self.dataset, self.columns = dataset, _columns(dataset, spec)
        users = dataset.examples("next", "train").user
        order = torch.randperm(len(users), generator=torch.Generator().manual_seed(0))
        if not len(users):
            raise ValueError(
                f"{dataset.path} has no train users with two events or more: a Markov chain learns nothing"
            )
        lengths = torch.from_numpy(np.diff(dataset.offsets))[users]
        kept = order[: int((lengths[order].cumsum(0) <= _MOST_PAIRS).sum())].sort().values
        whole = Examples.without_targets(users[kept].numpy(), lengths[kept].numpy())
        items, offsets = ops.gather_histories(dataset.items, dataset.offsets, whole.user, int(lengths.max()), whole.cut)
        owner = torch.repeat_interleave(torch.arange(len(whole)), offsets.diff())
        items, width = items.long(), dataset.num_items + 1
        pairs = (items[:-1] * width + items[1:])[owner[1:] == owner[:-1]]
        pairs, self.counts = torch.unique(pairs, return_counts=True)
        self.following = self.columns[pairs % width]
        self.begin = torch.searchsorted(pairs, torch.arange(width + 1) * width)
        outputs = spec.num_outputs(dataset.num_items)
        seen = self.columns[items]
        self.popularity = torch.bincount(seen[seen >= 0], minlength=outputs).double() * _SILENT
        self.name = "Markov chain" + ("" if len(kept) == len(users) else f", learned from {len(kept):,} train users")

    def __call__(self, examples: Examples) -> Tensor:
        last = self.dataset.offsets[examples.user.numpy()] + examples.cut.numpy() - 1
        last = torch.from_numpy(self.dataset.items[last.clip(min=0)]).long() * (examples.cut > 0)
        counts = self.begin[last + 1] - self.begin[last]
        row = torch.repeat_interleave(torch.arange(len(examples)), counts)
        index = torch.repeat_interleave(self.begin[last] - counts.cumsum(0) + counts, counts) + torch.arange(len(row))
        column = self.following[index]
        scores = self.popularity.repeat(len(examples), 1)
        return scores.index_put_(
            (row[column >= 0], column[column >= 0]), self.counts[index][column >= 0].double(), True
        )


class NearestUsers:
    """Targets of the k train users with the most similar sets of items, weighted by the cosine."""

    def __init__(self, dataset: Dataset, spec: TaskSpec):
        self.dataset, self.columns, self.outputs = dataset, _columns(dataset, spec), spec.num_outputs(dataset.num_items)
        train = dataset.examples(spec.name, "train")
        self.popularity = _popularity(dataset, spec, train.target) * _SILENT
        self.train = _some(train, _MOST_NEIGHBOURS)
        self.block = max(1, _SCORES // max(1, len(self.train)))  # examples whose cosines are held at a time
        items, offsets = _sets(dataset, self.train)
        owner = torch.repeat_interleave(torch.arange(len(self.train)), offsets.diff())
        order = items.argsort(stable=True)
        self.owner = owner[order].numpy()  # who has item i: owner[begin[i] : begin[i + 1]]
        self.begin = torch.searchsorted(items[order], torch.arange(dataset.num_items + 2)).numpy()
        self.norm = offsets.diff().clamp_min(1).sqrt().numpy()
        self.k = self._best_k(spec)
        self.name = f"nearest users (k = {self.k}{_part(self.train, train)})"

    def _best_k(self, spec: TaskSpec) -> int:
        valid, found = _some(self.dataset.examples(spec.name, "valid"), _MOST_VALID), {}
        blocks = [self._cosine(valid.select(rows)) for rows in torch.arange(len(valid)).split(self.block)]
        similarity = torch.cat(blocks) if blocks else torch.empty(0, len(self.train))
        for k in NEIGHBOURS if len(valid) else ():

            def scores(rows: Tensor, k: int = k) -> Tensor:
                return torch.cat([self._scores(part, k) for part in similarity[rows].split(self.block)])

            found[k] = _measure(self.dataset, spec, valid, scores)[spec.metric]
        return max(found, key=found.get, default=NEIGHBOURS[1])

    def __call__(self, examples: Examples) -> Tensor:
        blocks = torch.arange(len(examples)).split(self.block)
        return torch.cat([self._scores(self._cosine(examples.select(rows)), self.k) for rows in blocks])

    def _scores(self, similarity: Tensor, k: int) -> Tensor:
        weight, neighbour = similarity.topk(min(k, len(self.train)), dim=1)
        index, offsets = self.train.target_rows(neighbour.flatten())
        spread = torch.repeat_interleave(torch.arange(neighbour.numel()), offsets.diff())
        flat = spread // neighbour.shape[1] * self.outputs + self.columns[self.train.target[index]]
        scores = torch.bincount(flat, weight.flatten()[spread], minlength=len(similarity) * self.outputs)
        return scores.view(-1, self.outputs) + self.popularity

    def _cosine(self, examples: Examples) -> Tensor:
        """[b, train users] float64. Counts the items that two users share _MOST_SHARED pairs at a time: a popular item
        has many owners, and a long history many items."""
        items, offsets = (values.numpy() for values in _sets(self.dataset, examples))
        row, shape = np.repeat(np.arange(len(examples)), np.diff(offsets)), (len(examples), len(self.train))
        owners = self.begin[items + 1] - self.begin[items]
        block = np.cumsum(owners) // _MOST_SHARED
        both = np.zeros(shape[0] * shape[1], np.int64)
        for part in np.split(np.arange(len(items)), np.flatnonzero(np.diff(block)) + 1):
            count = owners[part]
            shift = np.repeat(self.begin[items[part]] - np.cumsum(count) + count, count)
            owner = self.owner[shift + np.arange(len(shift))]
            both += np.bincount(np.repeat(row[part], count) * shape[1] + owner, minlength=len(both))
        length = np.sqrt(np.maximum(np.diff(offsets), 1))[:, None]
        return torch.from_numpy(both.reshape(shape) / self.norm / length)


class BagOfItems:
    """Linear in the set of visible items, 0/1 scaled to length 1; C is picked by the loss of the valid users."""

    def __init__(self, dataset: Dataset, spec: TaskSpec):
        self.dataset, self.spec = dataset, spec
        whole = dataset.examples(spec.name, "train")
        train = _some(whole, _MOST_REGRESSION)
        valid = _some(dataset.examples(spec.name, "valid"), _MOST_VALID)
        target, self.mean, self.scale = train.target, 0.0, 1.0
        if spec.kind == "regression":
            self.mean, self.scale = float(target.mean()), float(target.std(correction=0).clamp_min(1e-12))
            target = (target - self.mean) / self.scale
        columns = spec.num_outputs(dataset.num_items)
        (items, offsets), rows = _sets(dataset, train), _rows_of_targets(train)
        wide, all_items = dataset.num_items > _MOST_WEIGHTS, torch.arange(1, dataset.num_items + 1)
        held = torch.unique(items) if wide else all_items
        self.place = all_items.new_zeros(dataset.num_items + 1)  # of an item's weight; the first stays 0
        self.place[held] = torch.arange(1, len(held) + 1)
        self.weight = [torch.zeros(len(held) + 1, columns), torch.zeros(columns)]
        sets, best = (self.place[items], offsets), (float("inf"), 0.0, self.weight)
        for c in STRENGTHS if len(valid) else STRENGTHS[3:4]:  # each fit starts from the one before
            self._fit(sets, rows, target, 1 / (2 * c * max(1, len(train))))
            loss = self._valid_loss(valid)
            if loss >= best[0]:
                break
            best = (loss, c, self.weight)
        _, c, self.weight = best
        kind = "ridge" if spec.kind == "regression" else "logistic"
        self.name = f"{kind} regression on the bag of items (C = {c:g}{_part(train, whole)})"

    def __call__(self, examples: Examples) -> Tensor:
        with torch.no_grad():
            output = self._output(*self._places(examples))
        return output if self.spec.kind == "classes" else output[:, 0] * self.scale + self.mean

    def _places(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Where the weights of each example's items are, packed: [t] and offsets [n + 1]."""
        items, offsets = _sets(self.dataset, examples)
        return self.place[items], offsets

    def _output(self, places: Tensor, offsets: Tensor) -> Tensor:
        weight, bias = self.weight
        total = F.embedding_bag(places, weight, offsets[:-1], mode="sum")
        return total / offsets.diff().clamp_min(1).sqrt()[:, None] + bias

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over targets [m]; output [m, C]."""
        if self.spec.kind == "classes":
            return F.cross_entropy(output, target)
        if self.spec.kind == "binary":
            return F.binary_cross_entropy_with_logits(output[:, 0], target.to(output.dtype))
        return F.mse_loss(output[:, 0], target.to(output.dtype))

    def _fit(self, sets: tuple[Tensor, Tensor], rows: Tensor, target: Tensor, penalty: float) -> None:
        self.weight = [w.detach().clone().requires_grad_() for w in self.weight]
        optimiser = torch.optim.LBFGS(self.weight, max_iter=60, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self._loss(self._output(*sets)[rows], target) + penalty * self.weight[0].square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weight = [w.detach() for w in self.weight]

    def _valid_loss(self, valid: Examples) -> float:
        if not len(valid):
            return 0.0
        with torch.no_grad():
            target = (valid.target - self.mean) / self.scale if self.spec.kind == "regression" else valid.target
            return float(self._loss(self._output(*self._places(valid))[_rows_of_targets(valid)], target))
