"""A softmax over a sample of a large catalogue: which items are drawn, and the loss of an items task over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_ext.data import ExampleBatch, Examples
from pcl_ext.model import Task, UserModel
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.layout import to_offsets
from pcl_ext.ops import catalogue_cross_entropy


class ItemSampler:
    """Items drawn with replacement by smoothed frequency, (count + 1) ^ 0.75. counts [V + 1] int64."""

    def __init__(self, counts: Tensor, draws: int):
        weights = (counts[1:].double() + 1.0).pow(0.75)
        self.draws, self.edges = draws, weights.cumsum(0)
        self.log_expected = (weights / self.edges[-1] * draws).log().float()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Ids [n], increasing, n at most `draws`, and the log of how often each was expected, by how often it came."""
        points = torch.rand(self.draws, dtype=torch.float64) * self.edges[-1]
        drawn = torch.searchsorted(self.edges, points, right=True).clamp_max(len(self.edges) - 1)
        drawn, times = torch.unique(drawn, return_counts=True)
        return drawn + 1, self.log_expected[drawn] - times.log()


def candidates(target: Tensor, drawn: Tensor, log_expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What targets [m] are chosen among: they themselves and the items drawn, as `ItemSampler` gives them.

    -> columns [C], increasing; the place [m] of each target among them; and log_expected [C] as
    `catalogue_cross_entropy` takes it.
    """
    columns, at = torch.unique(torch.cat([target, drawn]), return_inverse=True)
    corrections = log_expected.new_full((len(columns),), torch.inf)
    corrections[at[len(target) :]] = log_expected
    return columns, at[: len(target)], corrections


def places_in(columns: Tensor, items: Tensor) -> Tensor:
    """Where the items [n] are in columns [C], which increase; -1 where they are not."""
    place = torch.searchsorted(columns, items).clamp_max(len(columns) - 1)
    return torch.where(columns[place] == items, place, -1)


class SampledItemsLoss:
    """Cross-entropy of an items task's targets, each over the targets of the step and a sample of the catalogue.

    Made for a large catalogue: a step costs the same for any number of items but for their biases, of which the
    optimiser moves all. A head with rows of its own gets a sparse gradient of those that were scored; a tied one only
    reads them. The sum under the softmax is unbiased. The other targets of a user are chosen among as any item is,
    where they were drawn; what a history holds is not, or with `repeats`, where it votes for its own items, always is.
    """

    def __init__(self, model: UserModel, task: Task, examples: Examples, negatives: int):
        self.model, self.task = model, task
        target = task.columns(examples.target.to(model.device)).cpu()
        counts = torch.bincount(target + 1, minlength=len(task.catalogue) + 1)  # 0 is no item
        self.sampler = ItemSampler(counts, negatives)

    def __call__(self, batch: ExampleBatch) -> Tensor:
        batch, task = batch.to(self.model.device), self.task
        encoded = self.model.read(batch.history, task.spec.name)
        target = task.columns(batch.target)
        drawn, log_expected = (part.to(target.device) for part in self.sampler())
        if task.repeats is not None:
            return self._with_repeats(encoded, target, batch.target_row, drawn - 1, log_expected)
        columns, at, corrections = candidates(target, drawn - 1, log_expected)
        scores = (task.queries(encoded)[batch.target_row], self._rows(columns), task.head.bias[columns])
        older = (*self._seen(encoded, columns), batch.target_row)
        return catalogue_cross_entropy(*scores, at, log_expected=corrections, older=older)

    def _with_repeats(
        self, encoded: Encoded, target: Tensor, target_row: Tensor, drawn: Tensor, log_expected: Tensor
    ) -> Tensor:
        """Of each history its own items are there for certain, as targets are, and have its votes."""
        task = self.task
        users, held = encoded.users(), task.ranked.column_of[encoded.items]
        listed = held >= 0
        columns, at, corrections = candidates(torch.cat([target, held[listed]]), drawn, log_expected)
        scores = F.linear(task.queries(encoded), self._rows(columns), task.head.bias[columns])
        for piece in encoded.pieces:
            places = places_in(columns, task.ranked.column_of[piece.items])
            scores = task.repeats(scores, piece.states[-1], piece.users(), places)
        own = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        own[users[listed], at[len(target) :]] = True
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))[target_row]
        certain, at = own[target_row], at[: len(target)]
        certain[torch.arange(len(target), device=at.device), at] = True
        chosen = torch.where(certain, scores, scores - corrections)
        return F.cross_entropy(chosen, at) if len(target) else chosen.sum()

    def _rows(self, columns: Tensor) -> Tensor:
        """[C, width], what the queries are multiplied with."""
        if self.task.tied:
            return self.model.backbone.table[self.task.catalogue[columns]]
        return F.embedding(columns, self.task.head.rows, sparse=True)

    def _seen(self, encoded: Encoded, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where all that the histories hold lies in columns, [S], -1 where it does not; offsets [B + 1] of users."""
        users, items = encoded.seen()
        order = users.argsort(stable=True)
        offsets = to_offsets(torch.bincount(users, minlength=len(encoded.offsets) - 1))
        return places_in(columns, self.task.ranked.among(items[order], 0, len(self.task.catalogue))), offsets
