"""Kernels without the checks of each op: only for what the ops would take as it is, with the ops' own bits."""

import pytest
import torch
from attention_cases import to_offsets
from test_call import Seen
from torch.autograd import forward_ad

from pcl_ext import ops
from pcl_ext.ops import direct, linear_op

pytestmark = [
    pytest.mark.needs_ext,
    pytest.mark.skipif(not linear_op.PAYS, reason="the plain C++ products are left to torch"),
]
SHAPES = [(24, 8), (24,)]
OFFSETS = to_offsets([3, 0, 5])


def tensors(dtype=torch.float32):
    """Rows [8, 8], weight [24, 8], bias [24]."""
    return torch.randn(8, 8, dtype=dtype), torch.randn(24, 8, dtype=dtype), torch.randn(24, dtype=dtype)


class Other(torch.Tensor):
    """A tensor of another class."""


ODD = {
    "dtype": lambda x: x.double(),
    "gradient": lambda x: x.clone().requires_grad_(),
    "negated": torch._neg_view,
    "zero": lambda x: torch._efficientzerotensor(x.shape),
    "class": lambda x: x.as_subclass(Other),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "strides": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordinary_tensors_are_taken(dtype):
    rows, *weights = tensors(dtype)
    assert direct.takes(rows, weights, SHAPES)
    assert direct.takes(rows, [torch.nn.Parameter(w, requires_grad=False) for w in weights], SHAPES)
    assert not direct.takes(rows, weights, [(24, 8), (25,)])
    assert not direct.takes(rows[:, :7].contiguous(), weights, SHAPES)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("odd", ODD)
def test_what_an_op_would_not_take_as_it_is(odd, place):
    given = list(tensors())
    given[place] = ODD[odd](given[place])
    assert not direct.takes(given[0], given[1:], SHAPES)
    if odd == "gradient":
        with torch.no_grad():
            assert direct.takes(given[0], given[1:], SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_bytes_are_left_to_the_ops(dtype):
    rows, *weights = tensors(dtype)
    assert not direct.takes(rows, weights, SHAPES)


def test_whoever_wants_to_see_the_ops_does():
    rows, *weights = tensors()
    with Seen():
        assert not direct.takes(rows, weights, SHAPES)
    with forward_ad.dual_level():
        assert not direct.takes(rows, weights, SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        assert not direct.takes(rows, weights, SHAPES)
    assert torch.vmap(lambda x: x + int(direct.takes(rows, weights, SHAPES)))(rows).equal(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_have_the_bits_of_the_ops(dtype):
    (x, weight, bias), residual = tensors(dtype), torch.randn(8, 24, dtype=dtype)
    norm, out = tuple(torch.randn(2, 8, dtype=dtype)), (torch.randn(8, 24, dtype=dtype), torch.randn(8, dtype=dtype))
    for options in ({}, {"norm": norm, "eps": 1e-3}, {"residual": residual}):
        assert torch.equal(direct.linear(x, weight, bias, **options), ops.linear(x, weight, bias, **options))
    given = (x, norm, weight, bias, *out)
    assert torch.equal(direct.feed_forward(*given, eps=1e-3), ops.feed_forward(*given, eps=1e-3))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_attention_has_the_bits_of_the_ops(with_prefix):
    q, k, v = torch.randn(8, 3, 2, 16).unbind(1)
    prefix = (*torch.randn(2, 4, 2, 16), torch.tensor([0, 1, 4]), torch.tensor([1, 0, -1])) if with_prefix else ()
    plan = ops.attention_plan(OFFSETS, *prefix[2:])
    for name, rows in (("prompt_attention", q), ("newest_attention", q[[2, 7]])):
        got, want = (getattr(of, name)(rows, k, v, OFFSETS, *prefix, plan=plan) for of in (direct, ops))
        assert torch.equal(got, want)
        with pytest.raises(ValueError, match="plan must be made from the same offsets"):
            getattr(direct, name)(rows, k, v, OFFSETS + 1, *prefix, plan=plan)


@pytest.mark.parametrize("odd", ["gradient", "dtype", "negated", "class"])
def test_an_odd_prefix_is_left_to_the_ops(odd):
    (rows, *weights), (keys, values) = tensors(), torch.randn(2, 4, 2, 16)
    assert direct.takes(rows, weights, SHAPES, (keys, values))
    for prefix in ((ODD[odd](keys), values), (keys, ODD[odd](values))):
        assert not direct.takes(rows, weights, SHAPES, prefix)
