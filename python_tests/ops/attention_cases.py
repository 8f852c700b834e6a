"""Inputs of prompt_attention for the tests: lengths of histories and prefixes, who sees which; how right it must be."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pcl_ext import ops
from pcl_ext.ops import prompt_attention_op

# lengths of histories, lengths of prefixes (None: no prefix), prefix_index (None: left out)
CASES = {
    "one row": ([1], None, None),
    "plain": ([3, 1, 12], None, None),
    "empty histories": ([5, 0, 4, 0], [3], None),
    "all empty": ([0, 0], [2], None),
    "no histories": ([], [2], None),
    "shared prefix": ([7, 20, 33, 2], [16], None),
    "own prefixes": ([4, 9, 2], [3, 0, 17], None),
    "zero-length prefix": ([4, 9], [0], None),
    "some see none": ([5, 17, 1, 6], [3, 0, 20], [0, 2, -1, 1]),
    "unseen prefixes": ([5, 6], [3, 4, 5], [1, -1]),
    "no prefixes at all": ([5, 6], [], [-1, -1]),
    "longer than a block": ([130, 3, 97], [5, 40], [1, -1, 0]),
    "several chunks": ([60, 100, 70, 90, 110, 80], [6, 9], [0, 1, 0, 1, 0, 0]),
}
INPUTS = ("q", "k", "v", "prefix_k", "prefix_v")
IMPLS = ["reference", pytest.param("fused", marks=pytest.mark.needs_ext)]


@dataclass
class Case:
    """Arguments of prompt_attention."""

    rows: dict[str, Tensor | None]
    offsets: Tensor
    prefix_offsets: Tensor | None
    prefix_index: Tensor | None

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype."""
        rows = {n: None if x is None else x.detach().to(dtype).requires_grad_() for n, x in self.rows.items()}
        return Case(rows, self.offsets, self.prefix_offsets, self.prefix_index)

    def run(self, **options) -> Tensor:
        """prompt_attention on it."""
        rest = {"prefix_offsets": self.prefix_offsets, "prefix_index": self.prefix_index}
        return ops.prompt_attention(offsets=self.offsets, **self.rows, **rest, **options)

    def run_with_grads(self, grad_out: Tensor, **options) -> dict[str, Tensor]:
        """out and the gradient of every input."""
        out = self.run(**options)
        given = {n: x for n, x in self.rows.items() if x is not None}
        grads = torch.autograd.grad(out, list(given.values()), grad_out.to(out))
        return {"out": out.detach(), **dict(zip(given, grads))}

    def run_isa(self, grad_out: Tensor, isa: int, *, causal=True, scale=None, asked=INPUTS) -> dict[str, Tensor]:
        """run_with_grads by one instruction set's kernels, for the gradients asked for."""
        plan = ops.attention_plan(self.offsets, self.prefix_offsets, self.prefix_index)
        rows = [None if x is None else x.detach() for x in self.rows.values()]
        numbers = (plan.batch, plan.num_prefixes, causal, rows[0].shape[2] ** -0.5 if scale is None else scale)
        out, lse = prompt_attention_op.forward(*rows, plan.work, *numbers, isa=isa)
        needs = [x is not None and name in asked for name, x in zip(INPUTS, rows)]
        grads = prompt_attention_op.backward(grad_out, *rows, plan.work, out, lse, *numbers, needs, isa=isa)
        return {"out": out, **{n: g for n, g, need in zip(INPUTS, grads, needs) if need}}


def to_offsets(lengths: list[int]) -> Tensor:
    """Lengths to offsets."""
    return torch.tensor([0, *lengths]).cumsum(0)


def make(lengths, prefixes=None, index=None, *, heads=2, dim=16, dtype=torch.float32) -> Case:
    """Normal numbers in the given layout."""

    def rows(count):
        return torch.randn(count, heads, dim, dtype=torch.float64).to(dtype).requires_grad_()

    total, shared = sum(lengths), None if prefixes is None else sum(prefixes)
    given = {name: rows(total) for name in INPUTS[:3]}
    given |= {name: None if prefixes is None else rows(shared) for name in INPUTS[3:]}
    prefix_offsets = None if prefixes is None else to_offsets(prefixes)
    return Case(given, to_offsets(lengths), prefix_offsets, None if index is None else torch.tensor(index))


def assert_as_right_as(got: dict, reference: dict, exact: dict) -> None:
    """No tensor of got is more than twice as far from exact as reference is, root mean square; one rounding is free."""
    largest = max((x.abs().max() for x in exact.values() if x.numel()), default=0)
    for name, want in exact.items():
        assert got[name].shape == want.shape
        error, allowed = (got[name].double() - want).norm(), 2 * (reference[name].double() - want).norm()
        one_rounding = torch.finfo(got[name].dtype).eps * largest * want.numel() ** 0.5
        assert error <= max(allowed, one_rounding), f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def as_right_as(got, naive, exact):
    """At most twice the naive way's distance from float64, root mean square."""
    error, allowed = (got.double() - exact).norm(), 2 * (naive.double() - exact).norm()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
