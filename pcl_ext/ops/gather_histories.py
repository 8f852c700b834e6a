"""gather_histories: users out of a stored CSR, newest items kept."""

import numpy as np
import torch
from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import check_count
from pcl_ext.ops._native import use_fused


def gather_histories(values, offsets, rows, max_len: int, cut=None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Pick histories: values [E] int32 or int64, offsets [N + 1], rows [n] -> packed values [T], offsets [n + 1], int64.

    History r is values[offsets[r] : offsets[r + 1]], or its first cut entries where cut [n] int64 is given; the newest
    max_len of them are kept. values and offsets may be CPU tensors, numpy arrays or memory maps; only what is picked is
    read. Raises ValueError or TypeError naming what is wrong.
    """
    values = _array("values", values, (np.int32, np.int64))
    offsets = _array("offsets", offsets, (np.int64,))
    rows = _array("rows", rows, (np.int64,))
    cut = None if cut is None else _array("cut", cut, (np.int64,))
    check_count("max_len", max_len)
    begin, lengths = _ranges(values, offsets, rows, max_len, cut)
    use_fused(impl, torch.empty(0))
    return reference.gather_histories(values, begin, lengths)


def _array(name: str, value, dtypes: tuple) -> np.ndarray:
    """value as a 1-D array of one of dtypes, without a copy."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on the cpu, got {value.device}")
        value = value.detach().numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a Tensor or a numpy array, got {type(value).__name__}")
    if value.dtype not in dtypes or not value.dtype.isnative:
        raise TypeError(f"{name} must be {' or '.join(np.dtype(d).name for d in dtypes)}, got {value.dtype}")
    if value.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {value.shape}")
    return value


def _ranges(values, offsets, rows, max_len: int, cut) -> tuple[np.ndarray, np.ndarray]:
    """Where each kept history begins in values, and how long it is; checked."""
    if len(offsets) == 0:
        raise ValueError("offsets must hold at least one entry, the 0 it starts with, got none")
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"offsets must run from 0 to len(values) = {len(values)}, got {offsets[0]} to {offsets[-1]}")
    _check_bounds("rows", rows, 0, len(offsets) - 2)
    first, last = np.asarray(offsets[rows]), np.asarray(offsets[rows + 1])
    wrong = np.flatnonzero((first < 0) | (last < first) | (last > len(values)))
    if len(wrong):
        i = wrong[0]
        raise ValueError(f"offsets must never decrease, got {first[i]} then {last[i]} at row {rows[i]}")
    if cut is not None:
        if len(cut) != len(rows):
            raise ValueError(f"cut must be as long as rows, got {len(cut)} and {len(rows)}")
        _check_bounds("cut", cut, 0, last - first)
        last = first + cut
    lengths = np.minimum(last - first, max_len)
    return last - lengths, lengths


def _check_bounds(name: str, value: np.ndarray, low: int, high) -> None:
    wrong = np.flatnonzero((value < low) | (value > high))
    if len(wrong):
        i = wrong[0]
        bound = high[i] if isinstance(high, np.ndarray) else high
        raise ValueError(f"{name} must lie in {low}..{bound}, got {value[i]} at index {i}")
