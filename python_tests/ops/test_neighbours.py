"""What one user's rows hold, and where tensors begin in memory, changes no bit of the others' rows and gradients."""

import pytest
import torch
from attention_cases import make
from layer_cases import make_feed_forward, make_linear, to

from pcl_ext.ops import _native

pytestmark = pytest.mark.needs_ext
ODD = [float("nan"), float("inf"), -float("inf"), 3e38, -0.0, 1e-40]
ISAS = range(len(_native.C.isas())) if _native.has_fused() else []
LENGTHS, USER = [5, 7, 1, 33, 20, 3], slice(13, 46)  # the rows of the fourth
OTHERS = [r for r in range(sum(LENGTHS)) if not USER.start <= r < USER.stop]


def _same_bits(found: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(found.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", [[0] * 6, [0, 1, 0, 0, -1, 1]], ids=["one prefix", "some prefixes"])
def test_attention_of_others_is_untouched(index, isa, dtype):
    case = make(LENGTHS, [9, 11], index, dim=24, dtype=dtype)
    case.rows = {name: x.detach() for name, x in case.rows.items()}
    grad_out = torch.randn(case.rows["q"].shape).to(dtype)
    want = case.run_isa(grad_out, isa)
    for value in ODD:
        for name in ("q", "k", "v", "grad_out"):
            rows, grad = dict(case.rows), grad_out.clone()
            if name != "grad_out":
                rows[name] = rows[name].clone()
            (grad if name == "grad_out" else rows[name])[USER] = value
            found = type(case)(rows, case.offsets, case.prefix_offsets, case.prefix_index).run_isa(grad, isa)
            for part in ("out", "q", "k", "v"):
                assert _same_bits(found[part][OTHERS], want[part][OTHERS]), (value, name, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("make_layer", [lambda: make_linear(69, 32, 32), lambda: make_feed_forward(69, 32, 96)])
def test_layers_of_others_are_untouched(make_layer, isa, dtype):
    case = to(make_layer(), dtype)
    grad_out = torch.randn(69, 32).to(dtype)
    want = case.run_isa(grad_out, isa)
    for value in ODD:
        for where in ("x", "grad_out"):
            x, grad = case.x.detach().clone(), grad_out.clone()
            (x if where == "x" else grad)[USER] = value
            found = type(case)(**{**vars(case), "x": x}).run_isa(grad, isa)
            for part in want:
                assert _same_bits(found[part][OTHERS], want[part][OTHERS]), (value, where, part)


def _moved(x: torch.Tensor, bytes_on: int) -> torch.Tensor:
    """x at an address that is no multiple of its numbers' size."""
    room = torch.zeros(x.numel() * x.element_size() + bytes_on, dtype=torch.uint8)
    moved = torch.frombuffer(room.numpy(), dtype=x.dtype, count=x.numel(), offset=bytes_on).view(x.shape)
    return moved.copy_(x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bytes_on", [1, 2, 6])
def test_tensors_may_begin_anywhere(bytes_on, isa, dtype):
    if hasattr(_native.C, "overflow_an_int"):
        pytest.skip("the sanitizers refuse addresses that are not aligned")
    case = make(LENGTHS, [9, 11], [0, 1, 0, 0, -1, 1], dim=32, dtype=dtype)
    moved = {name: _moved(x, bytes_on) for name, x in case.rows.items()}
    offsets = _moved(case.offsets, bytes_on), _moved(case.prefix_offsets, bytes_on), _moved(case.prefix_index, bytes_on)
    grad_out = torch.randn(case.rows["q"].shape).to(dtype)
    found, want = type(case)(moved, *offsets).run_isa(_moved(grad_out, bytes_on), isa), case.run_isa(grad_out, isa)
    assert all(_same_bits(found[part], want[part]) for part in want)
