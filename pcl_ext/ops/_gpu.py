"""The CUDA module: loaded only where torch has CUDA; absent is fine, broken is loud. How the ops launch its kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_FOUND = find_spec("pcl_ext._cuda") is not None
_TORCH_HAS_CUDA = torch.version.cuda is not None  # torch.backends.cuda.is_built() says so of ROCm too
if _FOUND and _TORCH_HAS_CUDA:
    from pcl_ext import _cuda as CUDA  # a broken build must raise here
else:
    CUDA = None
_RUNS = CUDA is not None or find_spec("pcl_ext._cuda_emulated") is not None
# marking a function as a constant of compiled graphs imports torch's compiler: a second at every start
_constant = torch.compiler.assume_constant_result if _RUNS else lambda function: function

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_emulator = None  # what takes CPU tensors to the CUDA kernels, in tests


def cuda_status() -> str:
    """One line about the CUDA module, for `pcl info`."""
    if not _TORCH_HAS_CUDA:
        built = "built, not loaded" if _FOUND else "not built"
        return f"{built}: this torch ({torch.__version__}) has no CUDA"
    if CUDA is None:
        return (
            "not built: ops on CUDA tensors run on their PyTorch reference (install where CMake finds nvcc 11.8 or "
            "newer, with PCL_CUDA on, to build it)"
        )
    name, error = f"{CUDA.__file__}, {CUDA.compiler()}", CUDA.refusal()
    why = f" (CUDA error {error}, {CUDA.error_text(error)})" if error else ""
    if not torch.cuda.is_available():
        if error == 35:  # CUDA's own text speaks of an old driver alone
            why = " (CUDA error 35, the NVIDIA driver is missing or older than the kernels' CUDA)"
        return f"{name}, no CUDA device{why}"
    gpu, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if not _is_new_enough(torch.cuda.current_device()):
        return f"{name}, not used: {gpu} is sm_{major}{minor}, the kernels need sm_80"
    if error:
        return f"{name}, cannot run on {gpu} (sm_{major}{minor}){why}"
    return f"{name}, on {gpu} (sm_{major}{minor})"


@_constant
def _is_new_enough(device: int) -> bool:
    """A constant of compiled graphs, as all that a device can do."""
    return _capability(device)[0] >= 8


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@_constant
def attention_fits(device: int | None, dim: int, scalar: int) -> bool:
    """Whether a block of prompt_attention's kernels has the shared memory that head width dim needs: sm_86 and sm_89
    have less than sm_80."""
    if _emulator is not None:
        return _emulator.prompt_attention_fits(dim, scalar)
    return _fits_there(device, dim, scalar)


@cache
def _fits_there(device: int, dim: int, scalar: int) -> bool:
    with torch.cuda.device(device):
        return CUDA.prompt_attention_fits(dim, scalar)


def runs_cuda(tensor: Tensor) -> bool:
    """Whether tensor's kernels are those of the CUDA module."""
    return tensor.is_cuda or _emulator is not None


def emulates() -> bool:
    """Whether CPU tensors go the way of CUDA tensors, for tests."""
    return _emulator is not None


def has_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA module, or its emulation, can take tensor."""
    if _emulator is not None:
        return True
    if CUDA is None or not tensor.is_cuda:
        return False
    return _is_new_enough(tensor.device.index)


def module():
    """The CUDA module, or its emulation."""
    return CUDA if _emulator is None else _emulator


def launch(name: str, tensor: Tensor, *args) -> None:
    """The CUDA module's `name` on tensor's device and its current stream; a launch that fails raises."""
    if _emulator is not None:
        error = getattr(_emulator, name)(*args, 0)
    else:
        with torch.cuda.device(tensor.device):
            error = getattr(CUDA, name)(*args, torch.cuda.current_stream(tensor.device).cuda_stream)
    if error:
        text = module().error_text(error)
        raise RuntimeError(f"pcl_ext.{name} could not be launched on {tensor.device}: CUDA error {error}, {text}")


@contextmanager
def emulated(order: int = 0) -> Iterator[None]:
    """For tests: inside, CPU tensors go the way of CUDA tensors, to the same kernels run by the emulation.

    order is in which order threads and blocks take turns: 0 first to last, 1 last to first, others shuffled.
    """
    global _emulator
    from pcl_ext import _cuda_emulated

    _cuda_emulated.set_order(order)
    before, _emulator = _emulator, _cuda_emulated
    try:
        yield
    finally:
        _emulator = before
