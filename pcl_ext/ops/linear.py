"""linear: rows times a weight matrix, normalised before and added to others after."""

import torch
from torch import Tensor

from pcl_ext.ops import linear_op, reference
from pcl_ext.ops._check import FLOATS, check_like, check_number, check_shape, check_tensor, is_plain
from pcl_ext.ops._native import CPU_FLOATS, call, may_want_gradient, use_fused

_ONE_SUM = (torch.float32, torch.bfloat16)  # dtypes that are summed in float32


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """residual + layer_norm(x) @ weight.T + bias: x [T, D], weight [N, D], bias [N], residual [T, N] -> [T, N].

    norm is the layer norm's weight and bias, [D] each; bias, norm and residual may be left out. The fused path is for
    frozen weights: it gives gradients of x and residual, and a row's result has the same bits in any company. Where
    another tensor asks for a gradient, or the processor has the plain C++ products alone (no AVX2), impl="auto" takes
    the PyTorch path. All tensors share dtype and device; under autocast the product is in its dtype, with sums in
    float32, and a residual keeps its own. Raises ValueError or TypeError naming what is wrong.
    """
    if _is_right(impl, x, weight, bias, norm, residual, eps):
        args = (x, weight, bias, *(norm or (None, None)), residual, eps)
        return call(torch.ops.pcl_ext.linear.default, linear_op.forward, *args)
    check_tensor("x", x, 2, FLOATS)
    check_tensor("weight", weight, 2, FLOATS)
    check_number("eps", eps)
    parts = {"weight": weight} | ({} if bias is None else {"bias": bias}) | ({} if norm is None else norm_parts(norm))
    shapes = {"weight": ((weight.shape[0], x.shape[1]), "[N, D]"), "bias": (weight.shape[:1], "[N]")}
    check_weights(x, parts, shapes)
    if residual is not None:
        check_tensor("residual", residual, 2, FLOATS)
        check_shape("residual", residual, (x.shape[0], weight.shape[0]), "[T, N]")
        check_like("residual", residual, "x", x, dtype=not is_autocast(x))
    norm_weight, norm_bias = norm or (None, None)
    if use_frozen(impl, x, parts, residual):
        weight = product_dtype(weight)
        args = (x, weight, bias, norm_weight, norm_bias, residual, eps)
        return call(torch.ops.pcl_ext.linear.default, linear_op.forward, *args)
    return reference.linear(x, weight, bias, norm_weight, norm_bias, residual, eps)


def _is_right(impl: str, x, weight, bias, norm, residual, eps) -> bool:
    """Whether nothing is wrong and the fused path runs; no means that the checks have to look."""
    if not runs_plainly(impl, x, weight, eps) or not (norm is None or (type(norm) is tuple and len(norm) == 2)):
        return False
    (out, dim), dtype, norms = weight.shape, x.dtype, norm or ()
    return (
        x.shape[1] == dim
        and (bias is None or are_vectors(out, dtype, bias))
        and are_vectors(dim, dtype, *norms)
        and not may_want_gradient(weight, bias, *norms)
        and (residual is None or (is_plain(residual, 2, (dtype,)) and residual.shape == (len(x), out)))
    )


def runs_plainly(impl: str, x, weight, eps) -> bool:
    """Whether x and weight are ordinary matrices of one dtype that the CPU's kernels take, outside autocast."""
    return (
        impl == "auto"
        and linear_op.PAYS
        and type(eps) is float
        and not torch.compiler.is_compiling()
        and is_plain(x, 2, CPU_FLOATS)
        and is_plain(weight, 2, (x.dtype,))
        and not torch.is_autocast_enabled("cpu")
    )


def are_vectors(length: int, dtype: torch.dtype, *values) -> bool:
    """Whether values are ordinary vectors of this length and dtype."""
    dtypes = (dtype,)
    for value in values:
        if not (is_plain(value, 1, dtypes) and value.shape[0] == length):
            return False
    return True


def norm_parts(norm) -> dict[str, Tensor]:
    """A norm's tensors by name."""
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        raise TypeError(f"norm must be the pair (weight, bias) of a layer norm, got {type(norm).__name__}")
    return dict(zip(("norm weight", "norm bias"), norm))


def check_weights(x: Tensor, parts: dict[str, Tensor], shapes: dict[str, tuple]) -> None:
    """Shapes (a norm's are [D]), dtypes and devices of what rows x [T, D] are multiplied with."""
    autocast, dtypes, on_cpu = is_autocast(x), (x.dtype,), x.is_cpu
    for name, value in parts.items():
        shape, meaning = shapes.get(name, (x.shape[1:], "[D]"))
        if on_cpu and is_plain(value, None, dtypes) and value.shape == shape:
            continue
        check_tensor(name, value, None, FLOATS)
        check_shape(name, value, shape, meaning)
        check_like(name, value, "x", x, dtype=not autocast)


def use_frozen(impl: str, x: Tensor, parts: dict[str, Tensor], residual: Tensor | None = None) -> bool:
    """Whether the fused path runs: where it can, where none of parts asks for a gradient, and where all dtypes, the
    product's own under autocast too, are summed in one."""
    trained = [name for name, t in parts.items() if may_want_gradient(t)]
    if impl == "fused" and trained:
        raise ValueError(f"impl='fused' takes frozen weights, got {trained[0]} that asks for a gradient")
    if trained or not use_fused(impl, x) or (impl == "auto" and not linear_op.PAYS):
        return False
    dtypes = [t.dtype for t in (x, residual, *parts.values()) if t is not None]
    if is_autocast(x):
        dtypes.append(torch.get_autocast_dtype(x.device.type))
    if all(d in _ONE_SUM for d in dtypes) or all(d == torch.float64 for d in dtypes):
        return True
    if impl == "fused":
        found = ", ".join(sorted({str(d)[6:] for d in dtypes}))
        raise TypeError(f"impl='fused' takes float32 and bfloat16 together, or float64 throughout, got {found}")
    return False


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def product_dtype(weight: Tensor) -> Tensor:
    """weight in the dtype of its product: autocast's inside autocast."""
    if is_autocast(weight) and weight.dtype == torch.float32:
        return weight.to(torch.get_autocast_dtype(weight.device.type))
    return weight
