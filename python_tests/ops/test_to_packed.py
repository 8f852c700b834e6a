"""to_packed: exact copies, any dtype, strides, gradients, mistakes."""

import pytest
import torch
from attention_cases import IMPLS, to_offsets
from layout_cases import DTYPES, LENGTHS, numbers

from pcl_ext import ops


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_undoes_to_padded(lengths, impl, device):
    packed, offsets = numbers(sum(lengths), 3).to(device), to_offsets(lengths).to(device)
    padded = ops.to_padded(packed, offsets, 8, -2, impl=impl)
    assert torch.equal(ops.to_packed(padded, offsets, sum(lengths), impl=impl), packed)


@pytest.mark.needs_ext
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_equals_the_twin(dtype, shape, device):
    padded, offsets = numbers(3, 6, *shape, dtype=dtype).to(device), to_offsets([5, 0, 4]).to(device)
    got, want = (ops.to_packed(padded, offsets, 9, impl=impl) for impl in ("fused", "reference"))
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.needs_ext
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large(threads):
    torch.set_num_threads(threads)
    lengths = torch.randint(0, 60, (300,)).tolist()
    padded, offsets = numbers(300, 60, 64), to_offsets(lengths)
    got, want = (ops.to_packed(padded, offsets, sum(lengths), impl=impl) for impl in ("fused", "reference"))
    assert torch.equal(got, want)


@pytest.mark.needs_ext
def test_strided_blocks(device):
    offsets = to_offsets([5, 4]).to(device)
    wide = numbers(2, 6, 12).to(device)
    few = wide[..., :4].contiguous()
    for padded in (wide[..., 3:7], wide[..., ::2], few.view(6, 2, 4).transpose(0, 1), few[:, :1].expand(2, 6, 4)):
        assert torch.equal(ops.to_packed(padded, offsets, 9), ops.to_packed(padded.contiguous(), offsets, 9))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl, device):
    padded = torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    offsets = to_offsets([3, 0, 3]).to(device)
    assert torch.autograd.gradcheck(lambda x: ops.to_packed(x, offsets, 6, impl=impl), padded)


@pytest.mark.needs_ext
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad):
    args = (torch.randn(3, 4, 2, requires_grad=grad), to_offsets([3, 0, 3]), 6)
    torch.library.opcheck(torch.ops.pcl_ext.to_packed.default, args)


@pytest.mark.needs_ext
def test_compiles_as_one_graph():
    padded, offsets = torch.randn(3, 4, 2, requires_grad=True), to_offsets([3, 0, 3])

    def step(x):
        return ops.to_packed(2 * x, offsets, 6).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(padded), padded)[0] for f in (compiled, step))
    assert torch.equal(got, want)


MISTAKES = [
    ("padded", [1.0], TypeError, "padded must be a Tensor, got list"),
    ("padded", torch.zeros(2), ValueError, "padded must have at least 2 dimensions"),
    ("padded", torch.zeros(2, 4, device="meta"), ValueError, "offsets must be on the device of padded"),
    ("offsets", torch.tensor([0, 6]), ValueError, r"offsets must be \[B \+ 1\] = .3,., got .2,."),
    ("offsets", torch.tensor([0, 3, 7]), ValueError, "offsets must end at total = 6, got 7"),
    ("offsets", torch.tensor([0, 7, 6]), ValueError, "offsets must never decrease, got 7 then 6 at index 2"),
    ("offsets", torch.tensor([2, 3, 6]), ValueError, "offsets must start at 0, got 2"),
    ("offsets", torch.tensor([0, 1, 6]), ValueError, "histories must be at most max_seqlen = 4 long, got one of 5"),
    ("offsets", torch.tensor([0, 3, 6], dtype=torch.int32), TypeError, "offsets must be int64, got int32"),
    ("total", 5, ValueError, "offsets must end at total = 5, got 6"),
    ("total", -6, ValueError, "total must be at least 0, got -6"),
    ("total", None, TypeError, "total must be an int, got NoneType"),
    ("impl", "quick", ValueError, "impl must be one of"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_named(name, value, error, message, impl):
    right = {"padded": torch.randn(2, 4, 2), "offsets": to_offsets([3, 3]), "total": 6, "impl": impl}
    with pytest.raises(error, match=message):
        ops.to_packed(**{**right, name: value})
