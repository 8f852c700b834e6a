"""Item memory: a few numbers of the task's own for every item, pooled over the history."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.batch import PackedBatch
from pcl_ext.model.encoded import Encoded, pool, users_of
from pcl_ext.model.memories.base import Memory

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # constants of splitmix64 (Steele et al., 2014)


class ItemMemory(Memory):
    """A table of the task's own, [V + 1, width], summed over the history and divided by sqrt(n): memory by item.

    With more items than `rows` the table is [rows, width], and an item is the sum of two of its rows, each with a sign,
    that its id picks (Weinberger et al., 2009): a task does not grow with the catalogue, and two items that share one
    row hardly ever share the other. While the task learns, each event is left out with probability `dropout`: the bag
    of items must not be learned by heart. `whole`: it reads all events, not the backbone's newest max_len alone.
    """

    standardise = False

    def __init__(self, num_items: int, width: int, dropout: float, rows: int, *, whole: bool = True):
        super().__init__()
        self.num_features, self.dropout, self.num_items, self.whole = width, dropout, num_items, whole
        self.hashed = num_items + 1 > rows
        deviation = 0.1 * 2**-0.5 if self.hashed else 0.1
        self.table = nn.Parameter(torch.randn(rows if self.hashed else num_items + 1, width) * deviation)

    def features(self, encoded: Encoded) -> Tensor:
        index, offsets, weights = self.bags(encoded)
        return pool(self.table, index, offsets, weights)

    def item_table(self) -> Tensor:
        """[V + 1, width], what each item adds: the table itself, or made from hashed rows."""
        if not self.hashed:
            return self.table
        index, sign = hashed_rows(torch.arange(self.num_items + 1, device=self.table.device), len(self.table))
        return (self.table[index] * sign[:, :, None]).sum(1)

    def bags(self, read: Encoded | PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Histories as weighted sums of the table's rows: index [t], offsets [B + 1], weights [t]."""
        items, offsets = read.whole if self.whole else (read.items, read.offsets)
        scale = offsets.diff().clamp_min(1).to(self.table.dtype).rsqrt()
        weights = F.dropout(scale[users_of(offsets, len(items))], self.dropout, self.training)
        if not self.hashed:
            return items, offsets, weights
        index, sign = hashed_rows(items, len(self.table))
        return index.flatten(), offsets * 2, (weights[:, None] * sign).flatten()


def hashed_rows(items: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """items [t] -> the two of `rows` rows, [t, 2] int64, that each item has, and their signs, [t, 2] int8: always the
    same ones, so that none are stored."""
    mixed = (items.long()[:, None] * 2 + torch.arange(2, device=items.device) + 1) * _signed(_MIX[0])
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 1) % rows, ((mixed & 1) * 2 - 1).to(torch.int8)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as int64 has it."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, places: int) -> Tensor:
    """int64 words moved right as unsigned ones."""
    return (words >> places) & ((1 << (64 - places)) - 1)
