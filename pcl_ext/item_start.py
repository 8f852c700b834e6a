"""The closed-form start of an items task: its item memory and output rows from a ridge regression on bags of items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pcl_ext.data import Dataset, Examples, iterate
from pcl_ext.infer import evaluating
from pcl_ext.model import Task, UserModel
from pcl_ext.model.layout import to_offsets
from pcl_ext.model.ridge import Ridge, csr
from pcl_ext.progress import progress

_MOST_EXAMPLES = 20_000  # time grows with them, the regression hardly gains
_MOST_SCORES = 4_000_000  # held at a time
_MOST_ALL = 65_536  # items of a catalogue that are all in the regression
_FEWEST_USERS = 200  # fewer say little about the factor
_SCALES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@torch.no_grad()
def start_items(
    model: UserModel, dataset: Dataset, name: str, strengths: Sequence[float], score: Callable[[], float]
) -> None:
    """Start a new task where its item memory alone already ranks as a ridge regression does.

    Each target is one number of n users' rows Y [n, C], regressed on what the item memory sums of their histories; the
    best approximation of the memory's width splits into its table and the head's rows. A softmax needs larger numbers
    than a regression of zeros and ones gives: one factor, the one with the least loss when half of the events are left
    out. Of several strengths the one is kept whose `score()`, of the model as it then is, is the highest: where
    histories say little about the targets, that is a strong one, which ranks by popularity.
    """
    task = model.task(name)
    memory = task.memories["item_memory"]
    examples = _sample(dataset.examples(name, "train"))
    with evaluating(model):
        bags, targets = _bags(model, dataset, task, examples)
    rows, columns = len(memory.table), len(task.catalogue)
    x = csr(*bags, rows)
    counts, named = torch.bincount(targets[0], minlength=len(examples)), _named(targets[1], columns)
    place = torch.searchsorted(named, targets[1])
    y = csr(place, to_offsets(counts), torch.ones(len(place)), len(named))
    dropped = csr(bags[0], bags[1], _half(bags[2], task), rows)
    best, kept = 0.0, None
    for strength in _with_bar(strengths, name):
        regression = Ridge(x, y, strength)
        left, right = regression.factors(memory.num_features)
        factor = _factor(dropped @ left, right, regression.means, (targets[0], place), columns - len(named))
        start = (left * factor**0.5, right.T * factor**0.5, regression.means * factor)
        _start(task, *start, named)
        reached = score() if len(strengths) > 1 else 0.0
        if kept is None or reached > best:
            best, kept = reached, start
    _start(task, *kept, named)


def _start(task: Task, table: Tensor, rows: Tensor, bias: Tensor, named: Tensor) -> None:
    """Start a task at the output rows and biases of what is named, and at zeros elsewhere."""
    spread = (_spread(values.to(task.head.rows.dtype), named, len(task.catalogue)) for values in (rows, bias))
    task.start_items(table, *spread)


def _named(column: Tensor, count: int) -> Tensor:
    """Which of 0..count-1 a regression is made of, rising: of many those that are a target. To all others it gives
    zeros, in much time and memory."""
    return torch.arange(count) if count <= _MOST_ALL else torch.unique(column)


def _spread(values: Tensor, places: Tensor, count: int) -> Tensor:
    """values [n, ...] -> [count, ...]: rows at their places, zeros elsewhere."""
    return values if len(values) == count else values.new_zeros(count, *values.shape[1:]).index_copy_(0, places, values)


def _with_bar(strengths: Sequence[float], name: str) -> Iterator[float]:
    with progress(f"starting {name}, ridge regressions", len(strengths), " strengths") as bar:
        for strength in strengths:
            yield strength
            bar.update()


def _sample(examples: Examples) -> Examples:
    if len(examples) <= _MOST_EXAMPLES:
        return examples
    return examples.select(torch.randperm(len(examples))[:_MOST_EXAMPLES].sort().values)


def _bags(
    model: UserModel, dataset: Dataset, task: Task, examples: Examples
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What the item memory sums for each example: index [t], offsets [n + 1], weights [t]; and of all targets, by
    row, the row and the column, [m] int64 each."""
    index, lengths, weights, rows, columns, count = [], [], [], [], [], 0
    for batch in iterate(dataset, examples, max_tokens=65_536, max_len=model.backbone.config.max_len, seed=None):
        part, offsets, weight = task.memories["item_memory"].bags(batch.history)
        index.append(part)
        lengths.append(offsets.diff())
        weights.append(weight)
        rows.append(batch.target_row + count)
        columns.append(task.columns(batch.target.to(model.device)).cpu())
        count += len(batch.history)
    bags = torch.cat(index), to_offsets(torch.cat(lengths)), torch.cat(weights)
    return bags, (torch.cat(rows), torch.cat(columns))


def _half(weights: Tensor, task: Task) -> Tensor:
    """Half of the events left out, the others twice as heavy; an event's hashed rows go together."""
    each = 2 if task.memories["item_memory"].hashed else 1
    kept = torch.rand(len(weights) // each) < 0.5
    return weights * kept.repeat_interleave(each) * 2.0


def _factor(read: Tensor, right: Tensor, means: Tensor, targets: tuple[Tensor, Tensor], zeros: int = 0) -> float:
    """The factor with the least cross-entropy, on some of the users, drawn at random: read [n, k], right [k, C].

    zeros  how many more columns have a score of 0 for everybody
    """
    each = max(1, _MOST_SCORES // right.shape[1])
    most = max(each, _FEWEST_USERS)
    drawn = torch.arange(len(read)) if len(read) <= most else torch.randperm(len(read))[:most]
    losses, rest = [0.0] * len(_SCALES), torch.tensor(float(zeros), dtype=read.dtype).log()
    for users in drawn.split(each):
        place_of = torch.full((len(read),), -1)
        place_of[users] = torch.arange(len(users))
        row = place_of[targets[0]]
        row, column = row[row >= 0], targets[1][row >= 0]
        scores = read[users] @ right + means
        for place, factor in enumerate(_SCALES):
            own = scores[row, column] * factor
            total = torch.logsumexp(scores * factor, 1).logaddexp(rest)
            losses[place] += float((total[row] - own).sum())
    return float(_SCALES[losses.index(min(losses))])
