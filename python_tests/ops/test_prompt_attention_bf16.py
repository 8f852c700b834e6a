"""prompt_attention in bfloat16 on every instruction set, and on AMX's tiles as plain C++ computes them."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, assert_as_right_as, make

from pcl_ext import ops
from pcl_ext.ops import _native

pytestmark = pytest.mark.needs_ext
EMULATED_TILES = 5  # csrc/isa.h
ISAS = [*range(len(_native.C.isas())), EMULATED_TILES] if ops.has_fused() else []
WIDTHS = [1, 7, 16, 31, 32, 33, 48, 64, 80, 96, 112, 128, 150]


def compare(case: Case, isa: int, **options) -> None:
    """One instruction set against the twin, both against float64."""
    grad_out = torch.randn(case.rows["q"].shape).to(torch.bfloat16)
    exact = case.to(torch.float64).run_with_grads(grad_out, impl="reference", **options)
    want = case.run_with_grads(grad_out, impl="reference", **options)
    assert_as_right_as(case.run_isa(grad_out, isa, **options), want, exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_layout(name, causal, isa):
    compare(make(*CASES[name], dtype=torch.bfloat16), isa, causal=causal)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_every_head_width(dim, isa):
    compare(make([5, 40, 9, 1], [7], dim=dim, heads=3, dtype=torch.bfloat16), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("length", [*range(1, 36), 95, 96, 97, 127, 128, 129, 192, 193, 257])
def test_every_length(length, isa):
    compare(make([length], [length % 37], heads=1, dtype=torch.bfloat16), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_prefix_longer_than_a_block(isa):
    compare(make([30, 250, 1, 40], [205], dim=32, dtype=torch.bfloat16), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale, isa):
    compare(make(*CASES["some see none"], dtype=torch.bfloat16), isa, scale=scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [20, 1e3, 1e5])
@pytest.mark.parametrize("scale", [None, -0.25])
def test_large_scores_do_not_overflow(size, scale, isa):
    case = make([9, 30], [4], dtype=torch.bfloat16)
    with torch.no_grad():
        case.rows["q"] *= size
        case.rows["k"] *= size
    compare(case, isa, scale=scale)


@pytest.mark.parametrize("isa", ISAS)
def test_a_key_that_nobody_can_see_has_no_gradient(isa):
    case = make([40], heads=1, dtype=torch.bfloat16)
    with torch.no_grad():
        case.rows["q"].abs_()
        case.rows["k"][3, 0, 5] = -float("inf")
    grads = case.run_isa(torch.randn(40, 1, 16).bfloat16(), isa, asked=("k", "v"))
    for name in ("k", "v"):
        assert grads[name][3].abs().max() < 1e-30  # weights end at 2^-126


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("prefix", [16, 5])
def test_a_key_that_is_no_number_reaches_the_rows_that_see_it(prefix, isa):
    case = make([70], [prefix], heads=2, dtype=torch.bfloat16)
    with torch.no_grad():
        case.rows["k"][40, 0, 5] = float("nan")
    out = case.run_isa(torch.zeros(70, 2, 16).bfloat16(), isa, asked=("q",))["out"]
    assert out[40:, 0].isnan().all()
    assert out[:40].isfinite().all()
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_bits(threads, isa):
    lengths, index = torch.randint(0, 90, (60,)).tolist(), torch.randint(-1, 2, (60,)).tolist()
    case = make(lengths, [16, 5], index, dim=40, dtype=torch.bfloat16)
    grad_out = torch.randn(case.rows["q"].shape).to(torch.bfloat16)
    torch.set_num_threads(1)
    want = case.run_isa(grad_out, isa)
    torch.set_num_threads(threads)
    for _ in range(3):
        torch.testing.assert_close(case.run_isa(grad_out, isa), want, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [16, 40])
def test_company_does_not_change_bits_on_emulated_tiles(dim):
    lengths, prefixes, index = [40, 3, 0, 130, 7, 1, 19], [16, 5], [0, 1, 0, 0, -1, 1, 1]
    case = make(lengths, prefixes, index, dim=dim, dtype=torch.bfloat16)
    grad_out = torch.randn(case.rows["q"].shape).to(torch.bfloat16)
    crowd = case.run_isa(grad_out, EMULATED_TILES)
    for b in range(len(lengths)):
        mine = slice(case.offsets[b], case.offsets[b + 1])
        alone = make([lengths[b]], prefixes, index[b : b + 1], dim=dim, dtype=torch.bfloat16)
        rows = {n: x if n.startswith("prefix") else x[mine] for n, x in case.rows.items()}
        got = replace(alone, rows=rows).run_isa(grad_out[mine], EMULATED_TILES)
        for name in ("out", "q", "k", "v"):
            assert torch.equal(got[name], crowd[name][mine]), f"{name} of history {b}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("asked", [["prefix_k", "prefix_v"], ["q"], ["k"], ["v"], ["prefix_v"], ["q", "prefix_k"]])
def test_only_what_is_asked_for(asked, isa):
    case = make(*CASES["several chunks"], dtype=torch.bfloat16)
    grad_out = torch.randn(case.rows["q"].shape).to(torch.bfloat16)
    want = case.run_isa(grad_out, isa)
    got = case.run_isa(grad_out, isa, asked=asked)
    assert set(got) == {"out", *asked}
    for name in asked:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "dim"), [(3, 32), (3, 16), (5, 33)])
def test_strided_rows_give_the_same_bits(heads, dim, isa):
    case = make([5, 9], dtype=torch.bfloat16, heads=heads, dim=dim)
    grad_out = torch.randn(14, heads, dim).to(torch.bfloat16)
    want = case.run_isa(grad_out, isa)
    rows = dict(case.rows)
    for name in ("q", "k", "v"):
        buffer = torch.empty(14, heads * dim + 1, dtype=torch.bfloat16)[:, 1:]  # an odd address, maybe an odd stride
        buffer.copy_(case.rows[name].detach().flatten(1))
        rows[name] = buffer.unflatten(1, (heads, dim))
    got = replace(case, rows=rows).run_isa(grad_out, isa)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_emulated_tiles_are_never_chosen():
    assert EMULATED_TILES >= len(_native.C.isas())
    assert "emulated" not in ops.native_status()
