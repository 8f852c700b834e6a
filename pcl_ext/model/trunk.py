"""Many tasks, one user: the shared trunk once, and the tails of K tasks against it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pcl_ext.batch import PackedBatch
from pcl_ext.model.backbone import Backbone
from pcl_ext.model.memory import Encoded


def encode_on_shared_trunk(backbone: Backbone, batch: PackedBatch, tails: list[Tensor | None]) -> list[Encoded]:
    """States of a batch for K tasks that differ by their tail prompts alone, tails K x ([P, D] or None).

    Under a causal mask everything before the last P positions is the same for every task: T + K B P rows are computed
    instead of K T, equal to K separate passes up to float32 rounding.
    """
    longest = max((len(tail) for tail in tails if tail is not None), default=0)
    from_end = _distance_to_end(batch)
    in_tail = from_end < longest
    tail_rows, trunk_rows = torch.nonzero(in_tail)[:, 0], torch.nonzero(~in_tail)[:, 0]
    tail_lengths = batch.lengths.clamp_max(longest)
    rows = backbone.embed(batch)

    trunk, kept = backbone.run(rows[trunk_rows], _to_offsets(batch.lengths - tail_lengths))
    prompted = [_add_tail(rows[tail_rows], from_end[tail_rows], tail) for tail in tails]
    users = torch.arange(len(batch), device=batch.offsets.device)
    prefix = replace(kept, index=users.repeat(len(tails)))
    states, _ = backbone.run(torch.cat(prompted), _to_offsets(tail_lengths.repeat(len(tails))), prefix=prefix)

    parts = zip(*(state.split(len(tail_rows)) for state in states)) if len(tail_rows) else [states] * len(tails)
    order = torch.argsort(torch.cat([trunk_rows, tail_rows]))
    return [
        Encoded([torch.cat(pair)[order] for pair in zip(trunk, part)], batch.items, batch.offsets) for part in parts
    ]


def _distance_to_end(batch: PackedBatch) -> Tensor:
    """[T] int64, 0 for the newest row of each history."""
    row = torch.arange(batch.items.numel(), device=batch.items.device)
    return batch.offsets[1:][batch.users] - 1 - row


def _to_offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _add_tail(rows: Tensor, from_end: Tensor, tail: Tensor | None) -> Tensor:
    """Eq. 1 on rows that lie in the tail: row r from the end gets tail[P - 1 - r] where r < P."""
    if tail is None or not len(tail):
        return rows
    reached = from_end < len(tail)
    chosen = tail[(len(tail) - 1 - from_end).clamp_min(0)]
    return rows + chosen.masked_fill(~reached[:, None], 0.0)
