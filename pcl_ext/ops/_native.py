"""The compiled module: present, absent (PyTorch only) or broken, which is loud."""

from importlib.util import find_spec

import torch
from torch import Tensor

if find_spec("pcl_ext._C") is None:  # PyTorch-only install
    C = None
else:
    from pcl_ext import _C as C  # a broken build must raise here

FUSED_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
IMPLS = ("auto", "fused", "reference")


def has_fused() -> bool:
    """Whether the compiled module is there."""
    return C is not None


def native_status() -> str:
    """One line about the compiled module, for `pcl info`."""
    if C is None:
        return "not built: every op runs on its PyTorch reference (install without -Cwheel.cmake=false to build it)"
    return f"{C.__file__}, {C.compiler()}, instruction sets {', '.join(C.isas())}, using {C.isas()[-1]}"


def use_fused(impl: str, tensor: Tensor, dtypes: tuple = FUSED_FLOATS) -> bool:
    """Choose the path for tensor: auto takes the fused one when it can, fused takes it or raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return False
    can = C is not None and tensor.device.type == "cpu" and (not dtypes or tensor.dtype in dtypes)
    if impl == "fused" and not can:
        if C is None:
            raise RuntimeError("impl='fused' needs the compiled module pcl_ext._C, which is not built")
        raise TypeError(f"impl='fused' runs on cpu tensors of {dtypes}, got {tensor.dtype} on {tensor.device}")
    return can
