"""Next-item prediction at every position: the loss of pretraining, exact or over a sample of the items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pcl_ext.batch import PackedBatch
from pcl_ext.data import FOLDS, Dataset
from pcl_ext.model import Backbone, Task
from pcl_ext.ops import catalogue_cross_entropy
from pcl_ext.sampled_items import ItemSampler, candidates, places_in

_USERS = 100_000  # of a dataset that are counted at a time


class NextItemLoss:
    """Cross-entropy of the next item at every position, over all items or `negatives` drawn for each step.

    Where targets are new items, these are all that the user's history does not hold yet, its earlier windows included:
    what is ranked when the task is used.

    counts [V + 1] int64: how often each item occurs in the train users' histories.
    """

    def __init__(self, backbone: Backbone, task: Task, dataset: Dataset, negatives: int | None = None):
        self.backbone, self.task = backbone, task
        self.counts = item_counts(dataset)
        self.sampler = None if negatives is None else ItemSampler(self.counts, negatives)

    def __call__(self, batch) -> Tensor:
        history, target = (part.to(self.backbone.table.device) for part in shift(batch.history))
        if self.sampler is not None:
            return self._sampled(history, target.long())
        states = self.backbone(history)[-1]
        queries, head = self.task.head.queries(states, states), self.task.head
        seen = self._seen(history, lambda items: items.long() - 1)
        return catalogue_cross_entropy(queries, self.backbone.table[1:], head.bias, target.long() - 1, **seen)

    def _seen(self, history: PackedBatch, columns_of: Callable[[Tensor], Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """What the rows do not choose among: their own window so far, and what the user's history held before it."""
        if self.task.spec.repeats:
            return {}
        users, older = history.users, history.older
        seen = {"seen": (columns_of(history.items), history.offsets[users])}
        return seen if older is None else seen | {"older": (columns_of(older.items), older.offsets, users)}

    def _sampled(self, history: PackedBatch, target: Tensor) -> Tensor:
        """Softmax over the targets of the step and a sample of the items; the sum under it is unbiased.

        The backbone reads the rows of these items and of the histories alone, so the table's gradient is sparse, and a
        step costs the same for any number of items but for their biases, of which the optimiser moves all.
        """
        drawn, log_expected = (part.to(target.device) for part in self.sampler())
        columns, at, corrections = candidates(target, drawn, log_expected)
        ids, row = torch.unique(torch.cat([history.items.long(), columns]), return_inverse=True)
        items, scored = row.split([len(target), len(columns)])
        rows = F.embedding(ids, self.backbone.table, sparse=True)
        states = functional_call(self.backbone, {"table": rows}, (replace(history, items=items),))[-1]
        head, seen = self.task.head, self._seen(history, lambda items: places_in(columns, items.long()))
        scores = (head.queries(states, states), rows[scored], head.bias[columns - 1])
        return catalogue_cross_entropy(*scores, at, log_expected=corrections, **seen)


def shift(history: PackedBatch) -> tuple[PackedBatch, Tensor]:
    """Histories of n items -> histories of their first n - 1, and the item [T] that follows each row."""
    rows = torch.arange(history.items.numel(), device=history.items.device)
    first, last = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
    filled = history.lengths > 0
    first[history.offsets[:-1][filled]] = True
    last[history.offsets[1:][filled] - 1] = True
    lengths = (history.lengths - 1).clamp_min(0)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return PackedBatch.from_packed(history.items[~last], offsets, older=history.older), history.items[~first]


def item_counts(dataset: Dataset) -> Tensor:
    """[V + 1] int64: how often each item occurs in the train users' histories."""
    counts = np.zeros(dataset.num_items + 1, dtype=np.int64)
    train = dataset.fold == FOLDS.index("train")
    for first in range(0, dataset.num_users, _USERS):
        offsets = dataset.offsets[first : first + _USERS + 1]
        events = dataset.items[offsets[0] : offsets[-1]]
        keep = np.repeat(train[first : first + _USERS], np.diff(offsets))
        counts += np.bincount(events[keep], minlength=len(counts))
    return torch.from_numpy(counts)
