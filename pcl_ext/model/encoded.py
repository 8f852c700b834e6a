"""Histories as their readers see them, and the ways to compute them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_ext.batch import PackedBatch
from pcl_ext.model.backbone import Backbone
from pcl_ext.model.layout import LayerPrefix, newest_rows, to_offsets


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of every history, oldest first.

    states   num_layers + 1 tensors [T, D], the last one normalised
    items    [T] ids
    offsets  [B + 1] int64
    """

    states: list[Tensor]
    items: Tensor
    offsets: Tensor
    totals: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def total(self, depth: int) -> Tensor:
        """[B, D], the states of a layer summed over each history; summed once for all tasks that share the piece."""
        if depth not in self.totals:
            self.totals[depth] = self.pool(self.states[depth])
        return self.totals[depth]

    def pool(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """rows [T, F], weights [T] -> [B, F], summed over each history."""
        return pool(rows, torch.arange(len(rows), device=rows.device), self.offsets, weights)

    def users(self) -> Tensor:
        """[T] int64, which history each row belongs to."""
        return users_of(self.offsets, len(self.items))

    def select(self, users: Tensor) -> Piece:
        """The same for some of the users [b] int64."""
        rows, offsets = _rows_of(self.offsets, users)
        return Piece([state[rows] for state in self.states], self.items[rows], offsets)


@dataclass(frozen=True)
class Encoded:
    """What a readout sees of some histories, all of them read for one task.

    items    [T] ids
    offsets  [B + 1] int64
    newest   [B, D] last state of each history; 0 where it is empty
    pieces   together all rows of every history with their states; none where only the newest are read
    """

    items: Tensor
    offsets: Tensor
    newest: Tensor
    pieces: list[Piece]

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
        return total / self.offsets.diff().clamp_min(1)[:, None].to(total.dtype)

    def log_lengths(self) -> Tensor:
        """[B, 1] log(1 + n)."""
        return self.offsets.diff().to(self.newest.dtype).log1p()[:, None]

    def users(self) -> Tensor:
        """[T] int64, which history each row belongs to."""
        return users_of(self.offsets, len(self.items))

    def select(self, users: Tensor) -> Encoded:
        """The same for some of the users [b] int64."""
        rows, offsets = _rows_of(self.offsets, users)
        pieces = [piece.select(users) for piece in self.pieces]
        return Encoded(self.items[rows], offsets, self.newest[users], pieces)


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
    prompt: Tensor | None,
    index: Tensor | None,
    prefix: LayerPrefix | None,
    *,
    every_state: bool,
) -> Encoded:
    """One pass over a batch. every_state: all rows' states are read, not the newest ones alone.

    prompt [K, P, D] and index [B] as in `ops.embed`.
    """
    states = backbone(batch, prompt, index, prefix, "every" if every_state else "newest")
    pieces = [Piece(states, batch.items, batch.offsets)] if every_state else []
    return Encoded(batch.items, batch.offsets, newest_of(states[-1], batch.offsets, every_state), pieces)


def encode_on_trunk(
    backbone: Backbone, batch: PackedBatch, prompt: Tensor, index: Tensor | None, *, every_state: bool
) -> Encoded:
    """A batch read for one task through a trunk: a gradient of the prompts passes through the tails alone.

    prompt [K, P, D] and index [B] as in `ops.embed`.
    """
    return Trunk.of(backbone, batch, prompt.shape[1], every_state=every_state).read(prompt, index, every_state)[0]


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
    """

    backbone: Backbone
    items: Tensor
    offsets: Tensor
    kept: LayerPrefix
    piece: Piece | None
    tail_items: Tensor
    tail_offsets: Tensor

    @classmethod
    def of(cls, backbone: Backbone, batch: PackedBatch, length: int, *, every_state: bool) -> Trunk:
        """Compute what all ways share; length: P; every_state: some way reads the states of all rows."""
        items, offsets, tail_items, tail_offsets = _cut(batch, length)
        rows = backbone.embed(items, offsets, from_end=length)
        states, kept = backbone.run(rows, offsets, read="every" if every_state else "none")
        kept = replace(kept, index=torch.arange(len(batch), device=items.device))
        piece = Piece(states, items, offsets) if every_state else None
        return cls(backbone, batch.items, batch.offsets, kept, piece, tail_items, tail_offsets)

    def read(self, prompt: Tensor | None, index: Tensor | None, every_state: bool, ways: int = 1) -> list[Encoded]:
        """The histories in each of C ways; prompt [K, P, D], index [C * B]: which prompt each user has in each way, -1
        none; left out for one way and one prompt."""
        users, backbone = len(self.offsets) - 1, self.backbone
        items, offsets = self.tail_items.repeat(ways), to_offsets(self.tail_offsets.diff().repeat(ways))
        prefix = replace(self.kept, index=self.kept.index.repeat(ways))
        rows = backbone.embed(items, offsets, prompt, index)
        states, _ = backbone.run(rows, offsets, prefix=prefix, read="every" if every_state else "newest")
        top = newest_of(states[-1], offsets, every_state)
        tops = top.split(users) if users else [top] * ways
        if not every_state:
            return [Encoded(self.items, self.offsets, top, []) for top in tops]
        rows = len(self.tail_items)
        parts = zip(*(state.split(rows) for state in states)) if rows else [states] * ways
        tails = (Piece(list(part), self.tail_items, self.tail_offsets) for part in parts)
        return [Encoded(self.items, self.offsets, top, [self.piece, tail]) for top, tail in zip(tops, tails)]


def _cut(batch: PackedBatch, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items and offsets of what lies before the newest `length` rows of each history, and of these."""
    kept = batch.lengths.clamp_max(length)
    trunk_offsets, tail_offsets = to_offsets(batch.lengths - kept), to_offsets(kept)
    if batch.max_seqlen <= length:
        return batch.items[:0], trunk_offsets, batch.items, tail_offsets
    row = torch.arange(len(batch.items), device=batch.items.device)
    in_tail = row >= (batch.offsets[1:] - kept).repeat_interleave(batch.lengths, output_size=len(row))
    return batch.items[~in_tail], trunk_offsets, batch.items[in_tail], tail_offsets


def newest_of(states: Tensor, offsets: Tensor, every_state: bool) -> Tensor:
    """[B, D], the newest states among every one [T, D] or given as they are [m, D]; 0 where a history is empty."""
    rows = states.index_select(0, newest_rows(offsets)) if every_state else states
    filled = offsets.diff() > 0
    if len(rows) == len(filled):
        return rows
    return rows.new_zeros(len(filled), rows.shape[1]).index_copy(0, filled.nonzero()[:, 0], rows)


def _rows_of(offsets: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
    """The packed rows of some users [b], and their offsets [b + 1]."""
    picked = to_offsets(offsets.diff()[users])
    first = torch.repeat_interleave(offsets[users] - picked[:-1], picked.diff())
    return first + torch.arange(len(first), device=first.device), picked
