"""Rows with and without padding, for the benchmarks of to_padded and to_packed."""

import torch
from measure import lengths_of, to_offsets
from torch import Tensor

from pcl_ext import ops

USERS = 512
SHAPES = [(mean, dim) for mean in (20, 64, 200) for dim in (64, 256)]  # mean length, width


def make_rows(mean: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed [T, D] and padded [B, L, D] rows of USERS histories, their offsets [B + 1], and where padded holds one."""
    lengths = lengths_of(USERS, mean)
    offsets, total, longest = to_offsets(lengths), int(lengths.sum()), int(lengths.max())
    packed, mask = torch.randn(total, dim), torch.arange(longest) < lengths[:, None]
    return packed, ops.to_padded(packed, offsets, longest, impl="reference"), offsets, mask
