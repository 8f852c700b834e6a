"""Inputs of linear and feed_forward for the tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_ext import ops
from pcl_ext.ops import feed_forward_op, linear_op


@dataclass
class Linear:
    """Arguments of ops.linear; x asks for a gradient, and residual where there is one."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, Tensor] | None
    residual: Tensor | None

    def run(self, **options) -> Tensor:
        return ops.linear(self.x, self.weight, self.bias, norm=self.norm, residual=self.residual, **options)

    def run_isa(self, grad_out: Tensor, isa: int) -> dict[str, Tensor]:
        """out and grad_x by one instruction set's kernels."""
        x, norm = self.x.detach(), self.norm or (None, None)
        residual = None if self.residual is None else self.residual.detach()
        out = linear_op.forward(x, self.weight, self.bias, *norm, residual, 1e-5, isa=isa)
        return {"out": out, "x": linear_op.backward(grad_out, x, self.weight, *norm, 1e-5, isa=isa)}


@dataclass
class FeedForward:
    """Arguments of ops.feed_forward; x asks for a gradient."""

    x: Tensor
    norm: tuple[Tensor, Tensor]
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor

    def run(self, **options) -> Tensor:
        weights = (self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        return ops.feed_forward(self.x, self.norm, *weights, **options)

    def run_isa(self, grad_out: Tensor, isa: int) -> dict[str, Tensor]:
        """out and grad_x by one instruction set's kernels."""
        x, weights = self.x.detach(), (*self.norm, self.weight_in, self.bias_in, self.weight_out)
        out = feed_forward_op.forward(x, *weights, self.bias_out, 1e-5, isa=isa)
        return {"out": out, "x": feed_forward_op.backward(grad_out, x, *weights, 1e-5, isa=isa)}


def make_linear(rows, dim, out_dim, *, bias=True, norm=True, residual=True) -> Linear:
    """Normal numbers in float64, weights scaled as a layer's are."""
    x, weight = normal(rows, dim), normal(out_dim, dim) * dim**-0.5
    norms = (1 + 0.2 * normal(dim), 0.1 * normal(dim)) if norm else None
    more = normal(rows, out_dim).requires_grad_() if residual else None
    return Linear(x.requires_grad_(), weight, normal(out_dim) if bias else None, norms, more)


def make_feed_forward(rows, dim, hidden) -> FeedForward:
    """Normal numbers in float64, weights scaled as a layer's are."""
    norm = (1 + 0.2 * normal(dim), 0.1 * normal(dim))
    weights = (normal(hidden, dim) * dim**-0.5, normal(hidden), normal(dim, hidden) * hidden**-0.5, normal(dim))
    return FeedForward(normal(rows, dim).requires_grad_(), norm, *weights)


def normal(*shape) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(*shape, dtype=torch.float64)


def to(case, dtype: torch.dtype):
    """The same numbers in another dtype."""

    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return None if value is None else value.detach().to(dtype).requires_grad_(value.requires_grad)

    return type(case)(*(move(value) for value in vars(case).values()))


def run_with_grads(case, grad_out: Tensor, **options) -> dict[str, Tensor]:
    """out and the gradients of what asks for one."""
    out = case.run(**options)
    leaves = {name: x for name, x in vars(case).items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads))}
