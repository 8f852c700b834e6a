"""The compiled module: present, absent (PyTorch only) or broken, which is loud. What the ops need to call it."""

import warnings
from functools import cache, wraps
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from pcl_ext.ops import _gpu

if find_spec("pcl_ext._C") is None:  # PyTorch-only install
    C = None
else:
    from pcl_ext import _C as C  # a broken build must raise here

LIBRARY = torch.library.Library("pcl_ext", "FRAGMENT")
SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/isa.h
CPU_FLOATS = (torch.float32, torch.float64, torch.bfloat16)
IMPLS = ("auto", "fused", "reference")
BEST_ISA = -1
AVX512_BF16 = 3  # csrc/isa.h: the first that multiplies bfloat16
CPU = torch.device("cpu")


def _source_folder() -> Path | None:
    """The folder that pcl_ext was imported from, where that is a checkout of its sources."""
    folder = Path(__file__).parents[2]
    return folder if (folder / "CMakeLists.txt").is_file() and (folder / "csrc").is_dir() else None


if C is None and _source_folder() is not None:
    warnings.warn(
        f"pcl_ext is imported from its sources in {_source_folder()}, which hold no kernels: every op is many times "
        "slower; start Python in another folder, where it finds the installed package",
        stacklevel=2,
    )


def has_fused() -> bool:
    """Whether the compiled module is there."""
    return C is not None


def native_status(device: str = "cpu") -> str:
    """One line about the compiled module for a kind of device, "cpu" or "cuda", for `pcl info`."""
    if device == "cuda":
        return _gpu.cuda_status()
    if C is None and (folder := _source_folder()) is not None:
        return f"not built: {folder} holds the sources, not the installed package; start Python in another folder"
    if C is None:
        return "not built: every op runs on its PyTorch reference (install without -Cwheel.cmake=false to build it)"
    threads = "" if C.has_threads() else ", one thread alone (no OpenMP was found in torch)"
    return f"{C.__file__}, {C.compiler()}{threads}, instruction sets {', '.join(C.isas())}, using {C.isas()[-1]}"


@cache
def native_build() -> str:
    """The sha256 of the compiled module: another build may round otherwise. "" where there is none."""
    return "" if C is None else sha256(Path(C.__file__).read_bytes()).hexdigest()


def use_fused(
    impl: str,
    tensor: Tensor,
    cpu: tuple[torch.dtype, ...] | None = CPU_FLOATS,
    cuda: tuple[torch.dtype, ...] | None = None,
) -> bool:
    """Choose the path for tensor: auto takes the fused one when it can, fused takes it or raises.

    cpu and cuda: dtypes that kernels take there; empty for any, None without kernels.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return False
    if _gpu.runs_cuda(tensor):
        there, dtypes = _gpu.has_cuda(tensor), cuda
    else:
        there, dtypes = C is not None and tensor.is_cpu, cpu
    can = there and dtypes is not None and (not dtypes or tensor.dtype in dtypes)
    if impl == "fused" and not can:
        _refuse(tensor, there, cpu, cuda)
    return can


def _refuse(tensor: Tensor, there: bool, cpu: tuple | None, cuda: tuple | None) -> None:
    kind = tensor.device.type
    if not there and {"cpu": cpu, "cuda": cuda}.get(kind) is not None:
        module = {"cpu": "_C", "cuda": "_cuda"}[kind]
        raise RuntimeError(f"impl='fused' needs the compiled module pcl_ext.{module}, which is {native_status(kind)}")
    taken = {"cpu": cpu, "cuda": cuda}
    words = [f"{k} tensors of {', '.join(str(d)[6:] for d in t) or 'all'}" for k, t in taken.items() if t is not None]
    words = " and ".join(words)
    raise TypeError(f"impl='fused' takes {words}, got {str(tensor.dtype)[6:]} on {tensor.device}")


def define(
    name: str,
    schema: str,
    kernel,
    fake,
    autograd: type[torch.autograd.Function] | None = None,
    *,
    check,
    cuda: bool = False,
) -> None:
    """Register pcl_ext::name: its schema, its kernel where its module is there, its fake and its autograd rule.

    check takes the op's arguments and raises for dtypes and shapes that a kernel would misread: a program that was
    saved, and converted or given other inputs since, calls the op by its name. cuda: whether kernel takes CUDA tensors
    too, of which check reads no values.
    """

    def checked(*args):
        check_devices(*args)
        check(*args)
        return kernel(*args)

    LIBRARY.define(name + schema)
    if C is not None:
        LIBRARY.impl(name, checked, "CPU")
    if cuda and _gpu.CUDA is not None:
        LIBRARY.impl(name, checked, "CUDA")
    torch.library.register_fake(f"pcl_ext::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, _outside_transforms(autograd.apply), "Autograd")


def _outside_transforms(apply):
    """apply of an autograd.Function, which torch.func.grad and its kin cannot see through: that raises here."""

    def wrapper(*args):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.func.grad, jacrev, vjp and jvp cannot differentiate the kernels of pcl_ext: take "
                "impl='reference', which runs on PyTorch's operations, or torch.autograd.grad"
            )
        return apply(*args)

    return wrapper


def check_devices(*args) -> None:
    """All tensors among args sit on one device, whose kernel reads them all."""
    found = {x.device for x in args if isinstance(x, Tensor)}
    if len(found) > 1:
        raise ValueError(f"tensors must be on one device, got {', '.join(sorted(map(str, found)))}")


def check_floats(*tensors: Tensor | None, mixed: bool = False) -> None:
    """One dtype for all, of those that the kernels of their device take; mixed: float32 and bfloat16 may stand
    together."""
    there = [x for x in tensors if x is not None]
    found, taken = {x.dtype for x in there}, SCALARS if _gpu.runs_cuda(there[0]) else CPU_FLOATS
    alike = len(found) <= 1 or (mixed and torch.float64 not in found)
    if not alike or not found <= set(taken):
        *others, last = (str(dtype)[6:] for dtype in taken)
        names = ", ".join(sorted(str(dtype)[6:] for dtype in found))
        raise TypeError(f"kernels of pcl_ext take {', '.join(others)} or {last} throughout, got {names}")


def check_int64(*tensors: Tensor | None) -> None:
    """Offsets, indices and work lists."""
    for x in tensors:
        if x is not None and x.dtype != torch.int64:
            raise TypeError(f"kernels of pcl_ext take offsets and indices in int64, got {str(x.dtype)[6:]}")


class _NoSecondDerivative(torch.autograd.Function):
    """Its first `count` tensors; raises where one of them is differentiated by any of the tensors."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "an op of pcl_ext was differentiated twice, and its kernels have no second derivative; impl='reference' "
            "runs on PyTorch's operations"
        )


def once_only(backward):
    """Decorates backward(ctx, saved tensors, *grads) of an autograd.Function: to differentiate it again is an error.

    That of torch's own once_differentiable lies on no path to the inputs, so that autograd.grad skips it and gives 0.
    """

    @wraps(backward)
    def wrapper(ctx, *grads):
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them once
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return outputs
        return _NoSecondDerivative.apply(len(outputs), *outputs, *grads, *saved)

    return wrapper


def call(op, kernel, *args):
    """op(*args), or kernel(*args) where the dispatcher would do nothing else: it costs more than a small op."""
    # inside a transform, and where derivatives run forward, tensors do not say whether they want a gradient
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return op(*args)
    grad, ordinary = torch.is_grad_enabled(), not _is_watched()
    for a in args:
        if isinstance(a, Tensor):
            if grad and a.requires_grad:
                return op(*args)
            kind = type(a)
            # what lies in memory may still be to be negated, which the dispatcher does
            if not (kind is Tensor or kind is Parameter) or a.is_neg() or a._is_zerotensor():
                ordinary = False
    return kernel(*args) if ordinary else below_autograd(op, *args)


def is_unseen() -> bool:
    """Whether an op that needs no gradient may run past the dispatcher: nothing is compiled, transformed or watched."""
    return not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or _is_watched()
    )


def needs_dispatch(tensor: Tensor) -> bool:
    """Whether an ordinary tensor wants a gradient, or does not hold what lies in memory: it is still to be negated."""
    wants = tensor.requires_grad and torch.is_grad_enabled()
    return wants or tensor.is_neg() or tensor._is_zerotensor()


def _is_watched() -> bool:
    """Whether a mode or a trace wants to see every op."""
    return bool(_len_torch_dispatch_stack()) or _get_tracing_state() is not None


def may_want_gradient(*tensors: Tensor | None) -> bool:
    """Whether one of them asks for a gradient, or may: inside a transform such as vmap they do not say."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return True
    for x in tensors:  # any() of a generator takes three times as long, which small ops feel
        if x is not None and x.requires_grad:
            return True
    return False


def below_autograd(op, *args):
    """The op's kernel, from inside its autograd rule."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def packed_rows(tensor: Tensor, first: int) -> Tensor:
    """tensor itself where its dimensions from `first` on are contiguous, else a contiguous copy."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape[first:]), reversed(tensor.stride()[first:])):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor
