"""Checks the ops share: a quick look whether all is well, and those that name the argument, the rule and what came."""

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
ORDINARY = (Tensor, torch.nn.Parameter)


def is_plain(value, ndim: int | None, dtypes: tuple) -> bool:
    """Whether value is an ordinary dense CPU tensor of ndim dimensions with one of dtypes (any when None, empty).

    What an op asks first; only where the answer is no are the checks below worth their time, which say what is wrong.
    """
    return (
        type(value) in ORDINARY
        and value.is_cpu
        and (ndim is None or value.dim() == ndim)
        and (not dtypes or value.dtype in dtypes)
        and value.layout is torch.strided
    )


def are_plain_offsets(offsets) -> bool:
    """Whether check_offsets would find nothing wrong, next to a CPU tensor."""
    return is_plain(offsets, 1, (torch.int64,)) and offsets.shape[0] > 0


def check_tensor(name: str, value, ndim: int | None = None, dtypes: tuple = ()) -> None:
    """value is a strided tensor of ndim dimensions (any when None) with one of dtypes (any when empty)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {value.layout}")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(value.dtype)[6:]}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """value sits on other's device and, unless dtype is False, has its dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, got {value.device} and {other.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, got {value.dtype} and {other.dtype}")


def check_shape(name: str, value: Tensor, shape: tuple, meaning: str) -> None:
    """value has exactly this shape; meaning spells it in letters."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got {tuple(value.shape)}")


def check_offsets(name: str, offsets, like_name: str, like: Tensor) -> None:
    """offsets is [n + 1] int64 with n >= 0, on the device of like. Values: see check_offset_values."""
    check_tensor(name, offsets, 1, (torch.int64,))
    if offsets.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one entry, the 0 it starts with, got none")
    check_like(name, offsets, like_name, like, dtype=False)


def check_offset_values(name: str, offsets: Tensor, end: int | None, end_name: str) -> None:
    """offsets starts at 0, never decreases and ends at `end` (any end when None). Reads the values: CPU only."""
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {int(offsets[0])}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"{name} must never decrease, got {int(offsets[i])} then {int(offsets[i + 1])} at index {i + 1}"
        )
    if end is not None and offsets[-1] != end:
        raise ValueError(f"{name} must end at {end_name} = {end}, got {int(offsets[-1])}")


def check_range(name: str, value: Tensor, low: int, high: int) -> None:
    """low <= value <= high everywhere. Reads the values: CPU only."""
    if value.numel() == 0:
        return
    bad = ((value < low) | (value > high)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"{name} must lie in {low}..{high}, got {int(value[i])} at index {i}")


def check_count(name: str, value, low: int = 0) -> int:
    """value, an int (numpy's and traced ones too) of at least low."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def check_number(name: str, value) -> None:
    """value is a number, not a tensor."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def reads_values(tensor: Tensor) -> bool:
    """Whether checks may read values here: on a GPU that would stall it, and while compiling there are none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def autocast(*tensors):
    """Cast tensors of floats, but float64, to the autocast dtype, as torch does for its own attention."""
    first = tensors[0]
    kind = "cpu" if not isinstance(first, Tensor) or first.is_cpu or first.is_meta else first.device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]
