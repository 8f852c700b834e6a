"""pcl_ext::feed_forward and its backward for frozen weights: schema, kernel, fake, autograd."""

import torch

from pcl_ext.ops._native import BEST_ISA, C, address, below_autograd, define, once_only
from pcl_ext.ops.linear_op import check_given, check_products, matrix, operands, readable, wide

_INPUTS = "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight_in, Tensor bias_in, Tensor weight_out"


def forward(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps, *, isa=BEST_ISA):
    """out [T, D]."""
    out = forward_fake(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps)
    x, (weight_in, weight_out) = readable(x), operands(isa, weight_in, weight_out)
    norm_weight, norm_bias, bias_in, bias_out = map(wide, (norm_weight, norm_bias, bias_in, bias_out))
    return fill(out, x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps, isa)


def fill(out, x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps, isa=BEST_ISA):
    """out [T, D], of tensors that the kernel reads as they are."""
    C.feed_forward_fwd(
        matrix(x),
        matrix(weight_in),
        matrix(weight_out),
        norm_weight.data_ptr(),
        norm_bias.data_ptr(),
        eps,
        bias_in.data_ptr(),
        bias_out.data_ptr(),
        *x.shape,
        weight_in.shape[0],
        out.data_ptr(),
        isa,
        torch.get_num_threads(),
    )
    return out


def forward_fake(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps):
    """Output of forward, unfilled."""
    return x.new_empty(*x.shape)


def backward(grad_out, x, norm_weight, norm_bias, weight_in, bias_in, weight_out, eps, *, isa=BEST_ISA):
    """grad_x [T, D]."""
    grad_x = backward_fake(grad_out, x, norm_weight, norm_bias, weight_in, bias_in, weight_out, eps)
    grad_out, x = readable(grad_out), readable(x)
    weight_in, weight_in_t, weight_out_t = operands(isa, weight_in, weight_in.t(), weight_out.t())
    norm_weight, norm_bias, bias_in = map(wide, (norm_weight, norm_bias, bias_in))
    C.feed_forward_bwd(
        *map(matrix, (grad_out, x, weight_in, weight_out_t, weight_in_t)),
        *map(address, (norm_weight, norm_bias)),
        eps,
        address(bias_in),
        *(*x.shape, weight_in.shape[0]),
        *(grad_x.data_ptr(), isa, torch.get_num_threads()),
    )
    return grad_x


def backward_fake(grad_out, x, norm_weight, norm_bias, weight_in, bias_in, weight_out, eps):
    """Output of backward, unfilled."""
    return x.new_empty(x.shape)


def _check(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps, grad_out=None) -> None:
    check_products(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out)
    (rows, dim), hidden = x.shape, weight_in.shape[0]
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "bias_out": bias_out}
    matrices = {"weight_in": (weight_in, (hidden, dim), "[F, D]"), "weight_out": (weight_out, (dim, hidden), "[D, F]")}
    check_given({name: (value, (dim,), "[D]") for name, value in vectors.items()} | matrices)
    check_given({"bias_in": (bias_in, (hidden,), "[F]"), "grad_out": (grad_out, (rows, dim), "[T, D]")})
    if grad_out is not None and grad_out.dtype != x.dtype:  # it is added to grad_x as it lies in memory
        found = f"{str(grad_out.dtype)[6:]} and {str(x.dtype)[6:]}"
        raise TypeError(f"grad_out must have x's dtype, got {found}: hooks of saved tensors give back their dtypes")


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps):
        weights = (norm_weight, norm_bias, weight_in, bias_in, weight_out)
        ctx.save_for_backward(x, *weights)
        ctx.eps = eps
        return below_autograd(torch.ops.pcl_ext.feed_forward.default, x, *weights, bias_out, eps)

    @staticmethod
    @once_only
    def backward(ctx, saved, grad_out):
        grad_x = torch.ops.pcl_ext.feed_forward_backward.default(grad_out, *saved, ctx.eps)
        return grad_x, *(None,) * 7


define(
    "feed_forward_backward",
    f"(Tensor grad_out, {_INPUTS}, float eps) -> Tensor",
    backward,
    backward_fake,
    check=lambda grad_out, *inputs: _check(*inputs[:6], None, inputs[6], grad_out),
)
define(
    "feed_forward",
    f"({_INPUTS}, Tensor bias_out, float eps) -> Tensor",
    forward,
    forward_fake,
    _FeedForward,
    check=_check,
)
