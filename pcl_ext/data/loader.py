"""Batches of histories straight from the memory-mapped arrays: planned by length, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pcl_ext import ops
from pcl_ext.batch import PackedBatch
from pcl_ext.data.dataset import Dataset
from pcl_ext.data.examples import Examples


class ExampleBatch(NamedTuple):
    """b examples and their m targets.

    history     the newest max_len visible events of each; those before them as its `older`
    target      [m] int64 item ids, classes or 0/1; float32 for regression
    target_row  [m] int64, which row of the batch each target belongs to
    index       [b] int64, positions in the Examples
    """

    history: PackedBatch
    target: Tensor
    target_row: Tensor
    index: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ExampleBatch:
        """On a device, but for `index`; non_blocking as in `torch.Tensor.to`."""
        moved = (x.to(device, non_blocking=non_blocking) for x in self[:3])
        return ExampleBatch(*moved, self.index)


def plan(examples: Examples, *, max_tokens: int, max_len: int, seed: int | None) -> list[Tensor]:
    """Batches as positions in `examples`, at most max_tokens events each (a longer history is alone).

    seed  an int: another order for another seed; None: the fixed order of evaluation
    """
    lengths = examples.cut.clamp(1, max(1, max_len))  # an empty history takes a place too
    return ops.plan_batches(lengths, max_tokens, seed=0 if seed is None else seed)


def iterate(
    dataset: Dataset, examples: Examples, *, max_tokens: int, max_len: int, seed: int | None, start: int = 0
) -> Iterator[ExampleBatch]:
    """The batches of `plan` from number `start` on: training resumes where it stopped with the same bits."""
    for rows in plan(examples, max_tokens=max_tokens, max_len=max_len, seed=seed)[start:]:
        yield make_batch(dataset, examples, rows, max_len)


def make_batch(dataset: Dataset, examples: Examples, rows: Tensor, max_len: int) -> ExampleBatch:
    """The examples at positions `rows` [b] as one batch."""
    user, cut = examples.user[rows], examples.cut[rows]
    history = PackedBatch.from_stored(dataset.items, dataset.offsets, user, cut, max_len)
    index, target_offsets = examples.target_rows(rows)
    target_row = torch.repeat_interleave(torch.arange(len(rows)), target_offsets.diff())
    return ExampleBatch(history, examples.target[index], target_row, rows)
