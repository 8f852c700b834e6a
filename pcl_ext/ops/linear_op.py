"""pcl_ext::linear and its backward for frozen weights: schema, kernel, fake, autograd."""

import torch
from torch import Tensor

from pcl_ext.ops._check import check_shape
from pcl_ext.ops._native import (
    AVX512_BF16,
    BEST_ISA,
    SCALARS,
    C,
    address,
    below_autograd,
    check_floats,
    define,
    once_only,
    packed_rows,
)

_NORM = "Tensor? norm_weight, Tensor? norm_bias"
SUMS = (torch.float32, torch.float64)  # the dtypes that sums are taken in
_BEST = -1 if C is None else len(C.isas()) - 1
PAYS = _BEST > 0  # the plain C++ products, all there is without AVX2, are slower than torch's


def matrix(rows: Tensor | None) -> tuple[int, int, int]:
    """Address, row stride and dtype number of rows [T, D], whose last dimension is contiguous."""
    return (0, 0, 0) if rows is None else (rows.data_ptr(), rows.stride()[0], SCALARS[rows.dtype])


def readable(rows: Tensor | None) -> Tensor | None:
    """rows [T, D] themselves where their last dimension is contiguous, else a copy."""
    return rows if rows is None or rows.is_contiguous() else packed_rows(rows, 1)


def wide(x: Tensor | None) -> Tensor | None:
    """A bias or a norm's weight in the dtype of the sums."""
    if x is None or (x.dtype in SUMS and x.is_contiguous()):
        return x
    return x.to(x.dtype if x.dtype in SUMS else torch.float32).contiguous()


def operands(isa: int, *weights: Tensor) -> list[Tensor]:
    """Contiguous weights as their products read them: bfloat16 where the instruction set multiplies that and all
    dimensions are whole tiles, else the dtype of the sums."""
    if weights[0].dtype in SUMS or (_BEST if isa == BEST_ISA else isa) < AVX512_BF16:
        return [wide(w) for w in weights]
    pairs = all(w.dtype == torch.bfloat16 and not any(n % 32 for n in w.shape) for w in weights)
    return [_pairs(w) if pairs else wide(w) for w in weights]


def _pairs(weight: Tensor) -> Tensor:
    """Contiguous bfloat16, where pairs of numbers are read at once: at an address of whole pairs."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 4 == 0 else weight.clone()


def forward(x, weight, bias, norm_weight, norm_bias, residual, eps, *, isa=BEST_ISA):
    """out [T, N]."""
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias come together or not at all, got one of them")
    out = forward_fake(x, weight, bias, norm_weight, norm_bias, residual, eps)
    x, (weight,), residual = readable(x), operands(isa, weight), readable(residual)
    return fill(out, x, weight, wide(bias), wide(norm_weight), wide(norm_bias), residual, eps, isa)


def fill(out, x, weight, bias, norm_weight, norm_bias, residual, eps, isa=BEST_ISA) -> Tensor:
    """out [T, N], of tensors that the kernel reads as they are."""
    C.linear_fwd(
        matrix(x),
        matrix(weight),
        matrix(residual),
        address(norm_weight),
        address(norm_bias),
        eps,
        address(bias),
        *x.shape,
        weight.shape[0],
        out.data_ptr(),
        SCALARS[out.dtype],
        isa,
        torch.get_num_threads(),
    )
    return out


def forward_fake(x, weight, bias, norm_weight, norm_bias, residual, eps):
    """Output of forward, unfilled: of the residual's dtype, else of the weight's."""
    return (weight if residual is None else residual).new_empty(x.shape[0], weight.shape[0])


def backward(grad_out, x, weight, norm_weight, norm_bias, eps, *, isa=BEST_ISA):
    """grad_x [T, D]."""
    grad_x = backward_fake(grad_out, x, weight, norm_weight, norm_bias, eps)
    grad_out, x, (weight_t,) = readable(grad_out), readable(x), operands(isa, weight.t())
    norm_weight, norm_bias = wide(norm_weight), wide(norm_bias)
    C.linear_bwd(
        *map(matrix, (grad_out, x, weight_t)),
        *map(address, (norm_weight, norm_bias)),
        eps,
        *(x.shape[0], x.shape[1], weight.shape[0]),
        *(grad_x.data_ptr(), isa, torch.get_num_threads()),
    )
    return grad_x


def backward_fake(grad_out, x, weight, norm_weight, norm_bias, eps):
    """Output of backward, unfilled."""
    return x.new_empty(x.shape)


def check_products(*args) -> None:
    """float32 and bfloat16, or float64 throughout."""
    check_floats(*(x for x in args if isinstance(x, torch.Tensor)), mixed=True)


def check_given(shapes: dict[str, tuple]) -> None:
    """Each (tensor or None, its shape, what that means): a saved program calls the op by its name, unchecked."""
    for name, (value, shape, meaning) in shapes.items():
        if value is not None:
            check_shape(name, value, shape, meaning)


def _check(x, weight, bias, norm_weight, norm_bias, residual, eps, grad_out=None) -> None:
    check_products(x, weight, bias, norm_weight, norm_bias, residual, grad_out)
    (rows, dim), out = x.shape, weight.shape[0]
    norms = {"norm_weight": (norm_weight, (dim,), "[D]"), "norm_bias": (norm_bias, (dim,), "[D]")}
    results = {"residual": (residual, (rows, out), "[T, N]"), "grad_out": (grad_out, (rows, out), "[T, N]")}
    check_given({"weight": (weight, (out, dim), "[N, D]"), "bias": (bias, (out,), "[N]"), **norms, **results})


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, norm_bias, residual, eps):
        ctx.save_for_backward(x, weight, norm_weight, norm_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return below_autograd(torch.ops.pcl_ext.linear.default, x, weight, bias, norm_weight, norm_bias, residual, eps)

    @staticmethod
    @once_only
    def backward(ctx, saved, grad_out):
        if grad_out is None:
            return (None,) * 7
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.pcl_ext.linear_backward.default(grad_out, *saved, ctx.eps)
        return grad_x, None, None, None, None, grad_out if ctx.needs_input_grad[5] else None, None


define(
    "linear_backward",
    f"(Tensor grad_out, Tensor x, Tensor weight, {_NORM}, float eps) -> Tensor",
    backward,
    backward_fake,
    check=lambda grad_out, x, weight, *norm_eps: _check(x, weight, None, *norm_eps[:2], None, norm_eps[2], grad_out),
)
define(
    "linear",
    f"(Tensor x, Tensor weight, Tensor? bias, {_NORM}, Tensor? residual, float eps) -> Tensor",
    forward,
    forward_fake,
    _Linear,
    check=_check,
)
