"""gather_histories: users out of a stored CSR, newest items kept."""

import numpy as np
import torch
from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import check_count
from pcl_ext.ops._native import C, use_fused

VALUES = {"int32": torch.int32, "int64": torch.int64}
_CPU = torch.empty(0)


def gather_histories(values, offsets, rows, max_len: int, cut=None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Pick histories: values [E] int32 or int64, offsets [N + 1], rows [n] -> packed [T], offsets [n + 1]; int64.

    History r is values[offsets[r] : offsets[r + 1]], or its first cut entries where cut [n] int64 is given; the newest
    max_len of them are kept. values and offsets may be CPU tensors, numpy arrays or memory maps; only what is picked is
    read. Raises ValueError or TypeError naming what is wrong.
    """
    values = _array("values", values, (np.int32, np.int64))
    offsets = _array("offsets", offsets, (np.int64,))
    rows = _array("rows", rows, (np.int64,))
    cut = None if cut is None else _array("cut", cut, (np.int64,))
    max_len = check_count("max_len", max_len)
    _check_ends(values, offsets, rows, cut)
    if use_fused(impl, _CPU, dtypes=()):
        return _gather(values, offsets, rows, max_len, cut)
    begin, lengths = _ranges(values, offsets, rows, max_len, cut)
    return reference.gather_histories(values, begin, lengths)


def _gather(values, offsets, rows, max_len: int, cut) -> tuple[Tensor, Tensor]:
    """The compiled module's way: read what is picked straight from the arrays' memory."""
    arrays = [None if x is None else np.ascontiguousarray(x) for x in (values, offsets, rows, cut)]
    pointers = [0 if x is None else x.ctypes.data for x in arrays]
    stored = (*pointers[:2], len(values), len(offsets) - 1, values.itemsize)
    packed_offsets = torch.empty(len(rows) + 1, dtype=torch.int64)
    picked = (*pointers[2:], len(rows), min(max_len, len(values)), packed_offsets.data_ptr())
    if not C.gather_offsets(*stored, *picked):
        _ranges(values, offsets, rows, max_len, cut)
        raise AssertionError("the kernel refused what its rules allow")
    packed = torch.empty(int(packed_offsets[-1]), dtype=VALUES[values.dtype.name])
    C.gather_histories(*stored, *picked, packed.data_ptr(), torch.get_num_threads())
    return packed, packed_offsets


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


def _check_ends(values, offsets, rows, cut) -> None:
    if len(offsets) == 0:
        raise ValueError("offsets must hold at least one entry, the 0 it starts with, got none")
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"offsets must run from 0 to len(values) = {len(values)}, got {offsets[0]} to {offsets[-1]}")
    if cut is not None and len(cut) != len(rows):
        raise ValueError(f"cut must be as long as rows, got {len(cut)} and {len(rows)}")


def _ranges(values, offsets, rows, max_len: int, cut) -> tuple[np.ndarray, np.ndarray]:
    """Where each kept history begins in values, and how long it is; checked."""
    _check_bounds("rows", rows, 0, len(offsets) - 2)
    first, last = np.asarray(offsets[rows]), np.asarray(offsets[rows + 1])
    wrong = np.flatnonzero((first < 0) | (last < first) | (last > len(values)))
    if len(wrong):
        i = wrong[0]
        raise ValueError(f"offsets must never decrease, got {first[i]} then {last[i]} at row {rows[i]}")
    if cut is not None:
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
