"""to_packed: a padded block to packed rows."""

import torch
from torch import Tensor

from pcl_ext.ops import padded_op, reference
from pcl_ext.ops._check import are_plain_offsets, check_count, check_offsets, check_tensor, is_plain, reads_values
from pcl_ext.ops._native import call, use_fused
from pcl_ext.ops.padded_op import check_padded_values


def to_packed(padded: Tensor, offsets: Tensor, total: int, *, impl: str = "auto") -> Tensor:
    """Drop padding: padded [B, L, ...] of any dtype, offsets [B + 1] int64 -> packed [total, ...].

    total is offsets[-1], known to the host. Raises ValueError or TypeError naming what is wrong.
    """
    if not (is_plain(padded, None, ()) and padded.dim() > 1 and are_plain_offsets(offsets)):
        check_tensor("padded", padded)
        if padded.dim() < 2:
            raise ValueError(f"padded must have at least 2 dimensions, [B, L, ...], got shape {tuple(padded.shape)}")
        check_offsets("offsets", offsets, "padded", padded)
    if offsets.shape[0] - 1 != padded.shape[0]:
        raise ValueError(f"offsets must be [B + 1] = ({padded.shape[0] + 1},), got {tuple(offsets.shape)}")
    total = check_count("total", total)
    if use_fused(impl, padded, cpu=(), cuda=()):
        return call(torch.ops.pcl_ext.to_packed.default, padded_op.to_packed, padded, offsets, total)
    if reads_values(padded):
        check_padded_values(offsets, total, "total", padded.shape[1])
    return reference.to_packed(padded, offsets, total)
