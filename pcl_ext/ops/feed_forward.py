"""feed_forward: a pre-norm feed-forward block added to the rows it reads."""

import torch
from torch import Tensor

from pcl_ext.ops import direct, feed_forward_op, reference
from pcl_ext.ops._check import FLOATS, check_number, check_tensor, is_plain
from pcl_ext.ops._native import call, may_want_gradient
from pcl_ext.ops.linear import are_vectors, check_weights, norm_parts, product_dtype, runs_plainly, use_frozen


def feed_forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """x + gelu(layer_norm(x) @ weight_in.T + bias_in) @ weight_out.T + bias_out: x [T, D] -> [T, D].

    norm is the layer norm's weight and bias, [D] each; weight_in [F, D], bias_in [F], weight_out [D, F], bias_out [D].
    The hidden rows [T, F] are never held. As `linear`, the fused path is for frozen weights and gives the gradient of
    x; dtypes, autocast and errors are those of `linear`.
    """
    if _is_for_the_kernel(impl, x, norm, (weight_in, bias_in, weight_out, bias_out), eps):
        return direct.feed_forward(x, norm, weight_in, bias_in, weight_out, bias_out, eps=eps)
    if _is_right(impl, x, norm, weight_in, bias_in, weight_out, bias_out, eps):
        args = (x, *norm, weight_in, bias_in, weight_out, bias_out, eps)
        return call(torch.ops.pcl_ext.feed_forward.default, feed_forward_op.forward, *args)
    check_tensor("x", x, 2, FLOATS)
    check_tensor("weight_in", weight_in, 2, FLOATS)
    check_number("eps", eps)
    parts = norm_parts(norm) | {"weight_in": weight_in, "bias_in": bias_in, "weight_out": weight_out}
    parts |= {"bias_out": bias_out}
    hidden, dim = weight_in.shape[0], x.shape[1]
    shapes = {"weight_in": ((hidden, dim), "[F, D]"), "bias_in": ((hidden,), "[F]")}
    check_weights(x, parts, shapes | {"weight_out": ((dim, hidden), "[D, F]")})
    if use_frozen(impl, x, parts):
        weights = (product_dtype(weight_in), bias_in, product_dtype(weight_out), bias_out)
        return call(torch.ops.pcl_ext.feed_forward.default, feed_forward_op.forward, x, *norm, *weights, eps)
    return reference.feed_forward(x, *norm, weight_in, bias_in, weight_out, bias_out, eps)


def _is_for_the_kernel(impl: str, x, norm, weights: tuple, eps) -> bool:
    """Whether nothing is wrong and nobody but the kernel is to see the op; as quick as can be for seven tensors."""
    plain = impl == "auto" and type(eps) is float and type(norm) is tuple and len(norm) == 2
    if not plain or not is_plain(weights[0], 2, ()):
        return False
    hidden, dim = weights[0].shape
    return direct.takes(x, (*norm, *weights), ((dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)))


def _is_right(impl: str, x, norm, weight_in, bias_in, weight_out, bias_out, eps) -> bool:
    """Whether nothing is wrong and the fused path runs; no means that the checks have to look."""
    if not (runs_plainly(impl, x, weight_in, eps) and type(norm) is tuple and len(norm) == 2):
        return False
    hidden, dim = weight_in.shape
    return (
        x.shape[1] == dim
        and are_vectors(dim, x.dtype, *norm, bias_out)
        and are_vectors(hidden, x.dtype, bias_in)
        and is_plain(weight_out, 2, (x.dtype,))
        and weight_out.shape == (dim, hidden)
        and not may_want_gradient(*norm, weight_in, bias_in, weight_out, bias_out)
    )
