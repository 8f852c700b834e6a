"""PackedBatch: ragged histories back to back, checked once, ready for the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from pcl_ext import ops
from pcl_ext.ops._check import check_count, check_tensor

Ids = Sequence[int] | np.ndarray | Tensor  # of one history
Array = np.ndarray | Tensor


@dataclass(frozen=True, eq=False)  # two of them are equal where they are one
class Older:
    """What histories of B users held before the events that the backbone reads: an items task ranks it last, an item
    memory reads it too.

    items    [S] int32 or int64, 1..V
    offsets  [B + 1] int64; user b owns items[offsets[b] : offsets[b + 1]]
    on_host  [B] int64, ids per user, on the CPU wherever the rest is
    """

    items: Tensor
    offsets: Tensor
    on_host: Tensor

    def before(self, items: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """items [T] and offsets [B + 1] of what is read -> those of all, [S + T] oldest first and [B + 1]."""
        counts, read = self.offsets.diff(), offsets.diff()
        whole = items.new_empty(len(self.items) + len(items))
        for rows, first, each in ((self.items, offsets[:-1], counts), (items, self.offsets[1:], read)):
            place = torch.arange(len(rows), device=rows.device)
            whole[place + first.repeat_interleave(each, output_size=len(rows))] = rows.to(items.dtype)
        return whole, self.offsets + offsets

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Older:
        """The same on another device; non_blocking as in `torch.Tensor.to`."""
        moved = (x.to(device, non_blocking=non_blocking) for x in (self.items, self.offsets))
        return Older(*moved, self.on_host)

    def pin_memory(self) -> Older:
        """The same in page-locked memory."""
        return replace(self, items=self.items.pin_memory(), offsets=self.offsets.pin_memory())


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Histories of B users without padding.

    items       [T] int32 or int64, oldest first, 1..V
    offsets     [B + 1] int64; user b owns items[offsets[b] : offsets[b + 1]]
    max_seqlen  the longest history, a host int
    plan        the attention work list, made once and used by every layer
    on_host     [B] int64, items per user, on the CPU wherever the rest is: sizes are known without waiting for a GPU
    dropped     how many unknown ids `from_lists` left out
    older       what came before, where a history is longer than what the backbone reads of it
    """

    items: Tensor
    offsets: Tensor
    max_seqlen: int
    plan: ops.AttentionPlan
    on_host: Tensor
    dropped: int = 0
    older: Older | None = None

    @classmethod
    def from_packed(cls, items: Tensor, offsets: Tensor, dropped: int = 0, older: Older | None = None) -> PackedBatch:
        """items [T] int32 or int64, offsets [B + 1] int64, best on the CPU, where values are checked: offsets of a GPU
        are fetched, items of a GPU are taken as they are.

        Raises ValueError where the offsets do not fit the items, or an item is no id: these begin at 1. TypeError where
        offsets are not int64, or either is no tensor: `torch.from_numpy` makes one of an array. Ids past those that the
        backbone knows are refused when a model reads the batch.
        """
        check_tensor("items", items)
        check_tensor("offsets", offsets)
        if items.dim() != 1 or items.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"items must be [T] int32 or int64, got {list(items.shape)} {items.dtype}")
        host = offsets.cpu()
        plan = ops.attention_plan(host)
        total = int(host[-1]) if plan.total is None else plan.total
        if total != items.numel():
            raise ValueError(f"offsets must end at the number of items, got {total} and {items.numel()}")
        if items.is_cpu and len(items) and int(items.min()) < 1:
            row = int((items < 1).nonzero()[0])
            raise ValueError(f"items must be ids from 1 up, got {int(items[row])} in row {row}: leave padding out")
        lengths = host.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(items, offsets, longest, plan.to(offsets.device), lengths, dropped, older)

    @classmethod
    def from_lists(cls, histories: Sequence[Ids], *, num_items: int, max_len: int) -> PackedBatch:
        """Histories as lists of item ids, oldest first, of any length.

        Ids outside 1..num_items are unknown: dropped and counted. The newest max_len known ids of each are the batch's
        items, those before them its `older`. ValueError, with the history named, for what is no list of integers;
        TypeError where there is no list of them.
        """
        num_items, max_len = check_count("num_items", num_items), check_count("max_len", max_len, 1)
        many = isinstance(histories, Iterable) or hasattr(histories, "__getitem__")
        if isinstance(histories, str | bytes | dict) or not many:
            raise TypeError(f"histories must be a list of lists of item ids, got {type(histories).__name__}")
        ids, lengths = _flat(list(histories))
        user, known = torch.repeat_interleave(lengths), (ids >= 1) & (ids <= num_items)
        ids, user = ids[known], user[known]
        counts = torch.bincount(user, minlength=len(lengths))
        newest = torch.arange(len(ids), device=ids.device) >= (counts.cumsum(0) - max_len)[user]
        read = counts.clamp_max(max_len)
        before = counts - read
        older = Older(ids[~newest], _offsets(before), before) if bool(before.any()) else None
        return cls.from_packed(ids[newest], _offsets(read), len(known) - len(ids), older)

    @classmethod
    def from_padded(cls, padded: Tensor) -> PackedBatch:
        """Histories as the rows of padded [B, L] int32 or int64, oldest first; 0 is padding, on whichever side.

        All ids are read: cut to the newest `max_len` of the backbone before. Raises as `from_packed` does.
        """
        check_tensor("padded", padded)
        if padded.dim() != 2 or padded.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"padded must be [B, L] int32 or int64, got {list(padded.shape)} {padded.dtype}")
        known = padded != 0
        return cls.from_packed(padded[known], _offsets(known.sum(1)))

    @classmethod
    def from_stored(cls, values: Array, offsets: Array, rows: Array, cut: Array, max_len: int) -> PackedBatch:
        """The first cut [b] int64 events of the histories rows [b] int64 of a stored CSR, as `ops.gather_histories`
        takes them: the newest max_len are read."""
        max_len = check_count("max_len", max_len, 1)
        read = ops.gather_histories(values, offsets, rows, max_len, cut)
        before = torch.as_tensor(cut, device="cpu") - max_len
        older, most = None, int(before.max()) if len(before) else 0
        if most > 0:
            items, ends = ops.gather_histories(values, offsets, rows, most, before.clamp_min(0))
            older = Older(items, ends, ends.diff())
        return cls.from_packed(*read, older=older)

    def __len__(self) -> int:
        """B, the number of users."""
        return self.offsets.numel() - 1

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Items and offsets as above, with what is older."""
        return (self.items, self.offsets) if self.older is None else self.older.before(self.items, self.offsets)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, items per user."""
        return self.offsets.diff()

    @property
    def last_rows(self) -> Tensor:
        """[B] int64, the row of each user's newest item; meaningless (but in 0..T) for an empty history."""
        return (self.offsets[1:] - 1).clamp_min(0)

    @property
    def users(self) -> Tensor:
        """[T] int64, which user each row belongs to."""
        index = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(index, self.lengths, output_size=self.items.numel())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device; non_blocking as in `torch.Tensor.to`."""
        items, offsets = (x.to(device, non_blocking=non_blocking) for x in (self.items, self.offsets))
        older = None if self.older is None else self.older.to(device, non_blocking=non_blocking)
        plan = self.plan.to(device, non_blocking=non_blocking)
        return PackedBatch(items, offsets, self.max_seqlen, plan, self.on_host, self.dropped, older)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, as a DataLoader with `pin_memory=True` asks of it."""
        older = None if self.older is None else self.older.pin_memory()
        items, offsets = self.items.pin_memory(), self.offsets.pin_memory()
        return replace(self, items=items, offsets=offsets, plan=self.plan.pin_memory(), older=older)


def _offsets(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0))


def _flat(histories: list[Ids]) -> tuple[Tensor, Tensor]:
    """All ids back to back and how many each history has, [sum] and [B] int64."""
    if all(type(history) is list for history in histories):
        ids = list(chain.from_iterable(histories))
        with suppress(OverflowError):  # below, the history is named
            if set(map(type, ids)) <= {int}:
                return torch.from_numpy(np.array(ids, np.int64)), _lengths(histories)
    parts = [_as_ids(history, row) for row, history in enumerate(histories)]
    return torch.cat(parts), _lengths(parts)


def _lengths(histories: Sequence[Ids]) -> Tensor:
    return torch.tensor([len(history) for history in histories], dtype=torch.int64, device="cpu")


def _as_ids(history: Ids, row: int) -> Tensor:
    try:
        if len(history) == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        if isinstance(history, np.ndarray) and history.dtype.kind in "iu":
            history = np.array(history, np.int64, order="C")  # torch takes no other byte order, nor steps backwards
        ids = torch.as_tensor(history, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        hint = "; one history is a list in a list: [[1, 2, 3]]" if isinstance(history, int) else ""
        raise ValueError(f"history {row} must be a list of item ids, got {str(history):.80}{hint}") from error
    truths = isinstance(history, (list, tuple)) and any(isinstance(item, (bool, np.bool_)) for item in history)
    if truths or ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"history {row} must be a flat list of integer item ids, got {str(history):.80}")
    return ids.to(torch.int64)
