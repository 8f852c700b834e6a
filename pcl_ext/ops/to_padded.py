"""to_padded: packed rows to a padded block."""

import torch
from torch import Tensor

from pcl_ext.ops import padded_op, reference
from pcl_ext.ops._check import are_plain_offsets, check_count, check_offsets, check_tensor, is_plain, reads_values
from pcl_ext.ops._native import call, use_fused
from pcl_ext.ops.padded_op import check_padded_values


def to_padded(packed: Tensor, offsets: Tensor, max_seqlen: int, fill: float = 0, *, impl: str = "auto") -> Tensor:
    """Add padding: packed [T, ...] of any dtype, offsets [B + 1] int64 -> padded [B, max_seqlen, ...].

    Rows past a history's end hold fill. Raises ValueError or TypeError naming what is wrong.
    """
    if not (is_plain(packed, None, ()) and packed.dim() > 0 and are_plain_offsets(offsets)):
        check_tensor("packed", packed)
        if packed.dim() == 0:
            raise ValueError("packed must have at least 1 dimension, got a scalar")
        check_offsets("offsets", offsets, "packed", packed)
    max_seqlen = check_count("max_seqlen", max_seqlen)
    if isinstance(fill, Tensor) or not isinstance(fill, (bool, int, float, complex)):
        raise TypeError(f"fill must be a number, got {type(fill).__name__}")
    if fill != 0:
        try:
            packed.new_full((), fill)
        except (RuntimeError, OverflowError) as error:
            raise ValueError(f"fill must fit {packed.dtype}, got {fill}") from error
    if use_fused(impl, packed, cpu=(), cuda=()):
        return call(torch.ops.pcl_ext.to_padded.default, padded_op.to_padded, packed, offsets, max_seqlen, fill)
    if reads_values(packed):
        check_padded_values(offsets, packed.shape[0], "len(packed)", max_seqlen)
    return reference.to_padded(packed, offsets, max_seqlen, fill)
