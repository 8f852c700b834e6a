"""to_padded: packed rows to a padded block."""

from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import check_count, check_offset_values, check_offsets, check_tensor, reads_values
from pcl_ext.ops._native import use_fused


def to_padded(packed: Tensor, offsets: Tensor, max_seqlen: int, fill: float = 0, *, impl: str = "auto") -> Tensor:
    """Add padding: packed [T, ...] of any dtype, offsets [B + 1] int64 -> padded [B, max_seqlen, ...].

    Rows past a history's end hold fill. Raises ValueError or TypeError naming what is wrong.
    """
    check_tensor("packed", packed)
    if packed.dim() == 0:
        raise ValueError("packed must have at least 1 dimension, got a scalar")
    check_offsets("offsets", offsets, "packed", packed)
    check_count("max_seqlen", max_seqlen)
    if reads_values(packed):
        check_padded_values(offsets, packed.shape[0], "len(packed)", max_seqlen)
    use_fused(impl, packed, dtypes=())
    return reference.to_padded(packed, offsets, max_seqlen, fill)


def check_padded_values(offsets: Tensor, total: int, total_name: str, max_seqlen: int) -> None:
    """offsets fit total packed rows and no history is longer than max_seqlen. CPU only."""
    check_offset_values("offsets", offsets, total, total_name)
    if offsets.shape[0] > 1:
        longest = int(offsets.diff().max())
        if longest > max_seqlen:
            raise ValueError(f"histories must be at most max_seqlen = {max_seqlen} long, got one of {longest}")
