"""The best items of each user, chunk by chunk of the catalogue: exact, and equal scores go to the lowest id."""

from __future__ import annotations

import torch
from torch import Tensor

from pcl_ext.model.encoded import Encoded
from pcl_ext.model.task_module import Task

_CHUNK = 1 << 21  # scores held at a time: 8 MB


class TopItems:
    """The k best of what has been offered so far to each of B users; in `items` 0 where there were fewer.

    scores [B, k] float32, the best first, -inf where there is none; items [B, k] int64
    """

    def __init__(self, users: int, k: int, device: torch.device | str = "cpu"):
        self.k = k
        self.scores = torch.full((users, k), -torch.inf, dtype=torch.float32, device=device)
        self.items = torch.zeros(users, k, dtype=torch.int64, device=device)

    def offer(self, scores: Tensor, items: Tensor) -> None:
        """scores [B, c] float32 of items [c]; -inf is not offered."""
        # to find the best number is cheaper than to find k, and soon few users have one among so many that counts
        users = torch.nonzero(~(scores.amax(1) < self.scores[:, -1]))[:, 0]  # a NaN counts
        if len(users) < len(scores):
            scores = scores[users]
        best = scores.topk(min(self.k + 1, len(items)), dim=1)
        if bool(best.values[:, :1].isnan().any()):
            raise FloatingPointError("a score is NaN; the run or its input is damaged")
        places = best.indices[:, : self.k]
        if len(items) > self.k:
            # one more than is wanted tells where topk chose among equals, by no rule
            at_edge = best.values[:, self.k]
            tied = (best.values[:, self.k - 1] == at_edge) & (at_edge > -torch.inf)
            if bool(tied.any()):
                places[tied] = _order(scores[tied], items.expand(int(tied.sum()), -1)).topk(self.k, dim=1).indices
        scores = torch.cat([self.scores[users], scores.gather(1, places)], 1)
        items = torch.cat([self.items[users], items[places].masked_fill(scores[:, self.k :] == -torch.inf, 0)], 1)
        kept = _order(scores, items).topk(self.k, dim=1).indices
        self.scores[users], self.items[users] = scores.gather(1, kept), items.gather(1, kept)


def _order(scores: Tensor, items: Tensor) -> Tensor:
    """int64 that sort as the scores do (float32) and, where these are equal, against the ids."""
    bits = (scores + 0.0).view(torch.int32)  # no -0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0x7FFFFFFF - items)


def top_items(task: Task, encoded: Encoded, table: Tensor, k: int, *, skip_seen: bool = False) -> tuple[Tensor, Tensor]:
    """Items [B, k] int64 and scores [B, k] float32 of an items task, the best first; 0 and -inf where there are fewer.

    skip_seen leaves out what a history holds. Of the scores only a few MB are held at a time.
    """
    users, columns = encoded.offsets.numel() - 1, len(task.catalogue)
    queries = task.queries(encoded)
    best = TopItems(users, min(k, columns), queries.device)
    step = max(best.k + 1, _CHUNK // max(users, 1))
    for first in range(0, columns, step):
        last = min(first + step, columns)
        scores = task.item_scores(queries, encoded, table, first, last).float()
        if skip_seen:
            scores = task.ranked.rank_last(scores, encoded, first, -torch.inf)
        best.offer(scores, task.catalogue[first:last])
    return best.items, best.scores
