"""to_padded: exact copies, any dtype, strides, gradients, mistakes."""

import pytest
import torch
from attention_cases import IMPLS, to_offsets
from layout_cases import DTYPES, LENGTHS, numbers

from pcl_ext import ops


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_the_definition(lengths, impl, device):
    packed, offsets = numbers(sum(lengths), 3).to(device), to_offsets(lengths).to(device)
    padded = ops.to_padded(packed, offsets, 8, -2, impl=impl)
    assert padded.shape == (len(lengths), 8, 3)
    for b, length in enumerate(lengths):
        assert torch.equal(padded[b, :length], packed[offsets[b] : offsets[b + 1]])
        assert (padded[b, length:] == -2).all()


@pytest.mark.needs_ext
@pytest.mark.parametrize("fill", [0, 1, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_equals_the_twin(dtype, shape, fill, device):
    packed, offsets = numbers(9, *shape, dtype=dtype).to(device), to_offsets([5, 0, 4]).to(device)
    got, want = (ops.to_padded(packed, offsets, 6, fill, impl=impl) for impl in ("fused", "reference"))
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.needs_ext
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large(threads):
    torch.set_num_threads(threads)
    lengths = torch.randint(0, 60, (300,)).tolist()
    packed, offsets = numbers(sum(lengths), 64), to_offsets(lengths)
    got, want = (ops.to_padded(packed, offsets, 60, impl=impl) for impl in ("fused", "reference"))
    assert torch.equal(got, want)


@pytest.mark.needs_ext
def test_many_histories(cuda):
    lengths = torch.randint(0, 40, (150,)).tolist()
    packed, offsets = numbers(sum(lengths), 20).to(cuda), to_offsets(lengths).to(cuda)
    got, want = (ops.to_padded(packed, offsets, 40, impl=impl) for impl in ("fused", "reference"))
    assert torch.equal(got, want)
    assert torch.equal(ops.to_packed(got, offsets, sum(lengths), impl="fused"), packed)


@pytest.mark.needs_ext
def test_strided_rows(device):
    offsets = to_offsets([5, 4]).to(device)
    wide, few = numbers(9, 12).to(device), numbers(9, 4).to(device)
    for packed in (wide[:, 3:7], wide.t()[:9].t(), wide[::1, ::2], few[:1].expand(9, 4), few[:, :1]):
        assert torch.equal(ops.to_padded(packed, offsets, 6), ops.to_padded(packed.contiguous(), offsets, 6))


def test_nan_fill():
    assert ops.to_padded(torch.ones(1), to_offsets([1, 0]), 1, float("nan"))[1].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl, device):
    packed = torch.randn(6, 2, dtype=torch.float64, device=device, requires_grad=True)
    offsets = to_offsets([3, 0, 3]).to(device)
    assert torch.autograd.gradcheck(lambda x: ops.to_padded(x, offsets, 4, 1.5, impl=impl), packed)


@pytest.mark.needs_ext
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(grad):
    args = (torch.randn(6, 2, requires_grad=grad), to_offsets([3, 0, 3]), 4, 1.5)
    torch.library.opcheck(torch.ops.pcl_ext.to_padded.default, args)


@pytest.mark.needs_ext
def test_compiles_as_one_graph():
    packed, offsets = torch.randn(6, 2, requires_grad=True), to_offsets([3, 0, 3])

    def step(x):
        return ops.to_padded(2 * x, offsets, 4, 3).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(packed), packed)[0] for f in (compiled, step))
    assert torch.equal(got, want)


MISTAKES = [
    ("packed", [1.0], TypeError, "packed must be a Tensor, got list"),
    ("packed", torch.tensor(1.0), ValueError, "packed must have at least 1 dimension"),
    ("packed", torch.zeros(6, 2, device="meta"), ValueError, "offsets must be on the device of packed"),
    ("offsets", torch.tensor([0, 3, 7]), ValueError, r"offsets must end at len\(packed\) = 6, got 7"),
    ("offsets", torch.tensor([0, 7, 6]), ValueError, "offsets must never decrease, got 7 then 6 at index 2"),
    ("offsets", torch.tensor([1, 3, 6]), ValueError, "offsets must start at 0, got 1"),
    ("offsets", torch.tensor([0.0, 6.0]), TypeError, "offsets must be int64, got float32"),
    ("offsets", torch.zeros(0, dtype=torch.int64), ValueError, "offsets must hold at least one entry"),
    ("max_seqlen", 2, ValueError, "histories must be at most max_seqlen = 2 long, got one of 3"),
    ("max_seqlen", -1, ValueError, "max_seqlen must be at least 0, got -1"),
    ("max_seqlen", 3.0, TypeError, "max_seqlen must be an int, got float"),
    ("fill", "x", TypeError, "fill must be a number, got str"),
    ("impl", "quick", ValueError, "impl must be one of"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_named(name, value, error, message, impl):
    right = {"packed": torch.randn(6, 2), "offsets": to_offsets([3, 3]), "max_seqlen": 4, "impl": impl}
    with pytest.raises(error, match=message):
        ops.to_padded(**{**right, name: value})


@pytest.mark.parametrize("impl", IMPLS)
def test_fill_that_does_not_fit(impl):
    with pytest.raises(ValueError, match="fill must fit torch.uint8, got 300"):
        ops.to_padded(torch.ones(1, dtype=torch.uint8), to_offsets([1]), 2, 300, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_whole_number_beyond_any_does_not_fit(impl):
    with pytest.raises(ValueError, match="fill must fit torch.int64, got 1180591620717411303424"):
        ops.to_padded(torch.ones(1, dtype=torch.int64), to_offsets([1]), 2, 2**70, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_too_large_is_not_called_a_fill(impl):
    with pytest.raises(RuntimeError, match="[oO]verflow|memory"):
        ops.to_padded(torch.ones(1), to_offsets([1]), 2**62, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_negative_zero_is_kept(impl):
    padded = ops.to_padded(torch.ones(1), to_offsets([1]), 2, -0.0, impl=impl)
    assert torch.equal(padded.signbit(), torch.tensor([[False, True]]))
