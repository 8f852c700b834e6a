"""gather_histories: users out of a stored CSR, newest items kept."""

import numpy as np
import torch
from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import check_count, is_plain
from pcl_ext.ops._native import CPU, C, use_fused

_NUMBERS = {torch.int64: np.int64}
_VALUES = {torch.int32: np.int32, **_NUMBERS}
_ON_CPU = torch.empty(0, device=CPU)


def gather_histories(values, offsets, rows, max_len: int, cut=None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Pick histories: values [E] int32 or int64, offsets [N + 1], rows [n] -> packed [T], offsets [n + 1]; int64.

    History r is values[offsets[r] : offsets[r + 1]], or its first cut entries where cut [n] int64 is given; the newest
    max_len of them are kept. values and offsets may be CPU tensors, numpy arrays or memory maps; only what is picked is
    read, unless they have strides: then they are copied first. Raises ValueError or TypeError naming what is wrong.
    """
    max_len = check_count("max_len", max_len)
    if use_fused(impl, _ON_CPU, cpu=()):
        return _gather(values, offsets, rows, max_len, cut)
    begin, lengths = _ranges(values, offsets, rows, max_len, cut)
    return reference.gather_histories(_array("values", values, _VALUES), begin, lengths)


def _gather(values, offsets, rows, max_len: int, cut) -> tuple[Tensor, Tensor]:
    """The compiled module's way: read what is picked straight from the arrays' memory."""
    values, values_at = _memory("values", values, _VALUES)
    offsets, offsets_at = _memory("offsets", offsets, _NUMBERS)
    rows, rows_at = _memory("rows", rows, _NUMBERS)
    cut, cut_at = (None, 0) if cut is None else _memory("cut", cut, _NUMBERS)
    _check_lengths(offsets, rows, cut)
    count, dtype = rows.shape[0], torch.int64 if values.itemsize == 8 else torch.int32
    packed_offsets = torch.empty(count + 1, dtype=torch.int64, device=CPU)
    stored = (values_at, offsets_at, values.shape[0], offsets.shape[0] - 1, values.itemsize)
    picked = (rows_at, cut_at, count, min(max_len, values.shape[0]), packed_offsets.data_ptr())
    total = C.gather_offsets(*stored, *picked)
    if total < 0:
        _ranges(values, offsets, rows, max_len, cut)
        raise AssertionError("the kernel refused what its rules allow")
    packed = torch.empty(total, dtype=dtype, device=CPU)
    C.gather_histories(*stored, *picked, packed.data_ptr(), torch.get_num_threads())
    return packed, packed_offsets


def _memory(name: str, value, dtypes: dict) -> tuple[Tensor | np.ndarray, int]:
    """value, contiguous, and its address."""
    if is_plain(value, 1, tuple(dtypes)) and value.is_contiguous() and not value.is_neg():
        if torch._is_functional_tensor(value):
            raise TypeError(f"{name} must be a tensor with memory of its own, got one inside torch.func.functionalize")
        return value, value.data_ptr()
    array = np.ascontiguousarray(_array(name, value, dtypes))
    array = array if array.flags.aligned else array.copy()
    return array, array.ctypes.data


def _array(name: str, value, dtypes: dict) -> np.ndarray:
    """value as a 1-D array of one of dtypes, without a copy."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on the cpu, got {value.device}")
        value = value.detach().resolve_neg().numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a Tensor or a numpy array, got {type(value).__name__}")
    if value.dtype not in dtypes.values() or not value.dtype.isnative:
        raise TypeError(f"{name} must be {' or '.join(np.dtype(d).name for d in dtypes.values())}, got {value.dtype}")
    if value.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {value.shape}")
    return value


def _check_lengths(offsets, rows, cut) -> None:
    if offsets.shape[0] == 0:
        raise ValueError("offsets must hold at least one entry, the 0 it starts with, got none")
    if cut is not None and cut.shape[0] != rows.shape[0]:
        raise ValueError(f"cut must be as long as rows, got {len(cut)} and {len(rows)}")


def _ranges(values, offsets, rows, max_len: int, cut) -> tuple[np.ndarray, np.ndarray]:
    """Where each kept history begins in values, and how long it is; checked."""
    values = _array("values", values, _VALUES)
    offsets, rows = _array("offsets", offsets, _NUMBERS), _array("rows", rows, _NUMBERS)
    cut = None if cut is None else _array("cut", cut, _NUMBERS)
    _check_lengths(offsets, rows, cut)
    if offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"offsets must run from 0 to len(values) = {len(values)}, got {offsets[0]} to {offsets[-1]}")
    _check_bounds("rows", rows, 0, len(offsets) - 2)
    first, last = np.asarray(offsets[rows]), np.asarray(offsets[rows + 1])
    wrong = np.flatnonzero((first < 0) | (last < first) | (last > len(values)))
    if len(wrong):
        i = wrong[0]
        raise ValueError(f"offsets must never decrease, got {first[i]} then {last[i]} at row {rows[i]}")
    if cut is not None:
        _check_bounds("cut", cut, 0, last - first)
        last = first + cut
    lengths = np.minimum(last - first, min(max_len, len(values)))
    return last - lengths, lengths


def _check_bounds(name: str, value: np.ndarray, low: int, high) -> None:
    wrong = np.flatnonzero((value < low) | (value > high))
    if len(wrong):
        i = wrong[0]
        bound = high[i] if isinstance(high, np.ndarray) else high
        raise ValueError(f"{name} must lie in {low}..{bound}, got {value[i]} at index {i}")
