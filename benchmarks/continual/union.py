"""Batches that all tasks share: each history is read once, and every task with a target there learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_ext.batch import PackedBatch
from pcl_ext.data import Dataset, Examples, make_batch, plan
from pcl_ext.loop import LoopConfig


@dataclass(frozen=True)
class Share:
    """A task's part of a batch: rows [b] of the histories it learns from, its targets [m], and which of its b rows each
    belongs to [m]."""

    rows: Tensor
    target: Tensor
    target_row: Tensor


@dataclass(frozen=True)
class UnionBatch:
    history: PackedBatch
    shares: dict[str, Share]


class Union:
    """The distinct inputs (user, cut) of several tasks' examples.

    place  by task, [N] int64: where each input is among the task's examples, -1 where it is not
    """

    def __init__(self, dataset: Dataset, examples: dict[str, Examples]):
        self.dataset, self.examples = dataset, examples
        self.keys = {name: part.user * (1 << 32) + part.cut for name, part in examples.items()}
        keys = torch.cat(list(self.keys.values())).unique()
        self.inputs = Examples.without_targets((keys >> 32).numpy(), (keys & ((1 << 32) - 1)).numpy())
        self.place = {}
        for name, own in self.keys.items():
            self.place[name] = torch.full((len(keys),), -1)
            self.place[name][torch.searchsorted(keys, own)] = torch.arange(len(own))

    def batches(self, config: LoopConfig, max_len: int, epoch: int) -> tuple[int, Iterator[UnionBatch]]:
        """(steps of an epoch, its batches), as `epoch_batches` has them of one task."""
        tokens = config.step_tokens(int(self.inputs.cut.clamp(1, max_len).sum()))
        groups = plan(self.inputs, max_tokens=tokens, max_len=max_len, seed=config.seed + epoch)
        groups = groups[: max(1, config.epoch_tokens // tokens)]
        return len(groups), (self._batch(rows, max_len) for rows in groups)

    def _batch(self, rows: Tensor, max_len: int) -> UnionBatch:
        shares = {}
        for name, examples in self.examples.items():
            place = self.place[name][rows]
            own = torch.nonzero(place >= 0)[:, 0]
            index, offsets = examples.target_rows(place[own])
            target_row = torch.repeat_interleave(torch.arange(len(own)), offsets.diff())
            if len(own):
                shares[name] = Share(own, examples.target[index], target_row)
        return UnionBatch(make_batch(self.dataset, self.inputs, rows, max_len).history, shares)
