"""Histories as their readers see them, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_ext.batch import Older, PackedBatch
from pcl_ext.model.backbone import Backbone
from pcl_ext.model.layout import LayerPrefix, filled_histories, newest_rows, to_offsets


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of every history, oldest first.

    states   num_layers + 1 tensors [T, D], the last one normalised
    items    [T] ids
    offsets  [B + 1] int64
    on_host  [B] int64, its rows of each history, on the CPU; None: read from the offsets where they are needed
    """

    states: Sequence[Tensor]
    items: Tensor
    offsets: Tensor
    on_host: Tensor | None = None
    totals: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def total(self, depth: int) -> Tensor:
        """[B, D], the states of a layer summed over each history; summed once for all tasks that share the piece."""
        if depth not in self.totals:
            self.totals[depth] = self.pool(self.states[depth])
        return self.totals[depth]

    def pool(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """rows [T, F], weights [T] -> [B, F], summed over each history."""
        return pool(rows, self._own_rows, self.offsets, weights)

    @cached_property
    def _own_rows(self) -> Tensor:
        """[T] int64, as `pool` numbers them; made once for all layers."""
        return torch.arange(len(self.items), device=self.items.device)

    def users(self) -> Tensor:
        """[T] int64, which history each row belongs to."""
        return users_of(self.offsets, len(self.items))

    def select(self, users: Tensor, host_users: Tensor) -> Piece:
        """The same for some of the users [b] int64, given on the CPU too."""
        rows, offsets, on_host = _rows_of(self.offsets, users, self.on_host, host_users)
        return Piece([state[rows] for state in self.states], self.items[rows], offsets, on_host)


@dataclass(frozen=True)
class Encoded:
    """What a readout sees of some histories, all of them read for one task.

    items    [T] ids
    offsets  [B + 1] int64
    newest   [B, D] last state of each history; 0 where it is empty
    pieces   together all rows of every history with their states; none where only the newest are read
    on_host  [B] int64, their lengths on the CPU; None: read from the offsets where they are needed
    older    what they held before these rows, where they did
    """

    items: Tensor
    offsets: Tensor
    newest: Tensor
    pieces: list[Piece]
    on_host: Tensor | None = None
    older: Older | None = None
    _divisors: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    def rows(self, depth: int) -> Tensor:
        """[T, D], the states of a layer (0: the embeddings) in the order of `items`."""
        if len(self.pieces) == 1:
            return self.pieces[0].states[depth]
        starts = self.offsets[:-1].clone()
        places, states = [], []
        for piece in self.pieces:
            within = torch.arange(len(piece.items), device=starts.device) - piece.offsets[:-1][piece.users()]
            places.append(starts[piece.users()] + within)
            states.append(piece.states[depth])
            starts = starts + piece.offsets.diff()
        return torch.cat(states)[torch.cat(places).argsort()]

    def mean(self, depth: int) -> Tensor:
        """[B, D], the states of a layer (0: the embeddings) averaged over each history; 0 where it is empty."""
        total = sum(piece.total(depth) for piece in self.pieces)
        return total / self._divisor(total.dtype)

    def _divisor(self, dtype: torch.dtype) -> Tensor:
        """[B, 1], the lengths, at least 1; made once for all layers."""
        if dtype not in self._divisors:
            self._divisors[dtype] = self.offsets.diff().clamp_min(1)[:, None].to(dtype)
        return self._divisors[dtype]

    def log_lengths(self) -> Tensor:
        """[B, 1] log(1 + n)."""
        return self.offsets.diff().to(self.newest.dtype).log1p()[:, None]

    def users(self) -> Tensor:
        """[T] int64, which history each row belongs to."""
        return users_of(self.offsets, len(self.items))

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Items and offsets as above, with what is older; made once for all tasks that read them so."""
        return (self.items, self.offsets) if self.older is None else self.older.before(self.items, self.offsets)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Users [S] int64 and items [S] of all that the histories hold, and held before."""
        if self.older is None:
            return self.users(), self.items
        before = users_of(self.older.offsets, len(self.older.items))
        return torch.cat([before, self.users()]), torch.cat([self.older.items, self.items])

    def select(self, users: Tensor) -> Encoded:
        """The same for some of the users [b] int64; given on the CPU, nothing is read from a GPU."""
        here = users.to(self.offsets.device, non_blocking=True)
        rows, offsets, on_host = _rows_of(self.offsets, here, self.on_host, users)
        pieces = [piece.select(here, users) for piece in self.pieces]
        older = None if self.older is None else _select_older(self.older, here, users)
        return Encoded(self.items[rows], offsets, self.newest[here], pieces, on_host, older)


def pool(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [N, F], index [T] into them, weights [T] -> [B, F], summed over each of the histories of offsets [B + 1]."""
    bags = {"mode": "sum", "include_last_offset": True, "per_sample_weights": weights}
    return F.embedding_bag(index.to(torch.int64), rows, offsets, **bags)


def users_of(offsets: Tensor, total: int) -> Tensor:
    """offsets [B + 1] -> [total] int64, which history each row belongs to."""
    return torch.repeat_interleave(offsets.diff(), output_size=total)


def encode(
    backbone: Backbone,
    batch: PackedBatch,
    prompt: Tensor | None = None,
    index: Tensor | None = None,
    prefix: LayerPrefix | None = None,
    *,
    every_state: bool,
) -> Encoded:
    """One pass over a batch. every_state: all rows' states are read, not the newest ones alone.

    prompt [K, P, D] and index [B] as in `ops.embed`.
    """
    states = backbone(batch, prompt, index, prefix, "every" if every_state else "newest")
    pieces = [Piece(states, batch.items, batch.offsets, batch.on_host)] if every_state else []
    top = newest_states(states[-1], batch.offsets, batch.on_host) if every_state else states[-1]
    top = newest_of(top, batch.offsets, batch.on_host)
    return Encoded(batch.items, batch.offsets, top, pieces, batch.on_host, batch.older)


@dataclass(frozen=True)
class Trunk:
    """Histories up to their newest P rows, computed once; then ways of reading that differ by their tail prompts alone.

    Under a causal mask everything before the last P positions is the same for all of them: T + C B P rows are computed
    in place of C T, equal up to rounding.

    items         [T] ids of the histories
    offsets       [B + 1] int64
    kept          keys and values of the rows before the tails, index [B]
    piece         these rows; None where only newest states are read
    tail_items    [N] the newest P items of each history
    tail_offsets  [B + 1] int64
    on_host       [B] int64, the lengths of the histories on the CPU, and those of the tails; None: read where needed
    older         what the histories held before these rows, where they did
    """

    backbone: Backbone
    items: Tensor
    offsets: Tensor
    kept: LayerPrefix
    piece: Piece | None
    tail_items: Tensor
    tail_offsets: Tensor
    on_host: tuple[Tensor, Tensor] | None = None
    older: Older | None = None

    @classmethod
    def of(cls, backbone: Backbone, batch: PackedBatch, length: int, *, every_state: bool) -> Trunk:
        """Compute what all ways share; length: P; every_state: some way reads the states of all rows."""
        backbone.check_batch(batch)
        tails = batch.on_host.clamp_max(length)
        items, offsets, tail_items, tail_offsets = _cut(batch, length, int(tails.sum()))
        rows, before = backbone.embed(items, offsets, from_end=length), batch.on_host - tails
        states, kept = backbone.run(rows, offsets, read="every" if every_state else "none", on_host=before)
        kept = replace(kept, index=torch.arange(len(batch), device=items.device))
        piece = Piece(states, items, offsets, before) if every_state else None
        histories = (batch.items, batch.offsets)
        lengths = (batch.on_host, tails)
        return cls(backbone, *histories, kept, piece, tail_items, tail_offsets, lengths, batch.older)

    def read(self, prompt: Tensor | None, index: Tensor | None, every_state: bool, ways: int = 1) -> list[Encoded]:
        """The histories in each of C ways; prompt [K, P, D], index [C * B]: which prompt each user has in each way, -1
        none; left out for one way and one prompt."""
        users, backbone = len(self.offsets) - 1, self.backbone
        items, offsets = self.tail_items.repeat(ways), to_offsets(self.tail_offsets.diff().repeat(ways))
        prefix = replace(self.kept, index=self.kept.index.repeat(ways))
        rows = backbone.embed(items, offsets, prompt, index)
        whole, tails = self.on_host or (None, None)
        here = None if tails is None else tails.repeat(ways)
        read = "every" if every_state else "newest"
        states, _ = backbone.run(rows, offsets, prefix=prefix, read=read, on_host=here)
        top = newest_states(states[-1], offsets, here) if every_state else states[-1]
        top = newest_of(top, offsets, here)
        tops = top.split(users) if users else [top] * ways
        if not every_state:
            return [Encoded(self.items, self.offsets, top, [], whole, self.older) for top in tops]
        rows = len(self.tail_items)
        parts = zip(*(state.split(rows) for state in states)) if rows else [states] * ways
        pieces = ([self.piece, Piece(list(part), self.tail_items, self.tail_offsets, tails)] for part in parts)
        return [Encoded(self.items, self.offsets, top, both, whole, self.older) for top, both in zip(tops, pieces)]


def _cut(batch: PackedBatch, length: int, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items and offsets of what lies before the newest `length` rows of each history, and of these `total` rows."""
    kept = batch.lengths.clamp_max(length)
    trunk_offsets, tail_offsets = to_offsets(batch.lengths - kept), to_offsets(kept)
    if batch.max_seqlen <= length:
        return batch.items[:0], trunk_offsets, batch.items, tail_offsets
    trunk = _places(batch.offsets[:-1], trunk_offsets, len(batch.items) - total)
    tail = _places(batch.offsets[1:] - kept, tail_offsets, total)
    return batch.items[trunk], trunk_offsets, batch.items[tail], tail_offsets


def newest_states(states: Tensor, offsets: Tensor, on_host: Tensor | None) -> Tensor:
    """states [T, D] -> [m, D], those of the newest rows; on_host as in `filled_histories`."""
    return states.index_select(0, newest_rows(offsets, on_host))


def newest_of(rows: Tensor, offsets: Tensor, on_host: Tensor | None) -> Tensor:
    """rows [m, D] of the histories that are not empty -> [B, D], 0 where one is; on_host as in `filled_histories`."""
    users = len(offsets) - 1
    if len(rows) == users:
        return rows
    return rows.new_zeros(users, rows.shape[1]).index_copy(0, filled_histories(offsets, on_host), rows)


def _rows_of(offsets: Tensor, users: Tensor, on_host: Tensor | None, host_users: Tensor) -> tuple:
    """The packed rows of some users [b], their offsets [b + 1], and their lengths on the CPU where these are known."""
    picked = to_offsets(offsets.diff()[users])
    if on_host is None:
        return _places(offsets[users], picked, int(picked[-1])), picked, None
    on_host = on_host[host_users.cpu()]
    return _places(offsets[users], picked, int(on_host.sum())), picked, on_host


def _select_older(older: Older, users: Tensor, host_users: Tensor) -> Older:
    rows, offsets, on_host = _rows_of(older.offsets, users, older.on_host, host_users)
    return Older(older.items[rows], offsets, on_host)


def _places(first: Tensor, offsets: Tensor, total: int) -> Tensor:
    """[total] int64: the rows first[b], first[b] + 1, ... of each b, as many as offsets [B + 1] have."""
    start = (first - offsets[:-1]).repeat_interleave(offsets.diff(), output_size=total)
    return start + torch.arange(total, device=first.device)
