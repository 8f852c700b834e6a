"""prompt_attention against its twin and against float64."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, assert_as_right_as, make

from pcl_ext import ops
from pcl_ext.ops import _gpu, _native, prompt_attention_op

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ISAS = range(len(_native.C.isas())) if ops.has_fused() else []
WIDTHS = [1, 8, 16, 20, 33, 64, 128]


def compare(case: Case, **options) -> None:
    """fused against the twin, by the bound above; float64 is held to rounding."""
    grad_out = torch.randn(case.rows["q"].shape, dtype=torch.float64).to(case.rows["q"].dtype)
    want = case.run_with_grads(grad_out, impl="reference", **options)
    got = case.run_with_grads(grad_out, impl="fused", **options)
    if case.rows["q"].dtype == torch.float64:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        return
    assert_as_right_as(got, want, case.to(torch.float64).run_with_grads(grad_out, impl="reference", **options))


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused_is_as_right_as_the_twin(name, dtype):
    compare(make(*CASES[name], dtype=dtype))


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", WIDTHS)
def test_every_head_width(dim, dtype):
    compare(make([5, 40, 9], [7], dim=dim, heads=3, dtype=dtype))


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "some see none", "longer than a block"])
def test_not_causal(name, dtype):
    compare(make(*CASES[name], dtype=dtype), causal=False)


@pytest.mark.needs_ext
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale):
    compare(make(*CASES["some see none"]), scale=scale)


@pytest.mark.needs_ext
def test_large_scores_do_not_overflow():
    case = make([9, 30], [4])
    with torch.no_grad():
        case.rows["q"] *= 300
    compare(case)


@pytest.mark.needs_ext
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lengths", [([3000], None), ([40, 41], [3000])], ids=["own rows", "prefix"])
def test_rounding_does_not_grow_with_the_rows(lengths, isa):
    case = make(*lengths, heads=1)
    with torch.no_grad():
        for rows in case.rows.values():
            _ = None if rows is None else rows.abs_()  # sums that grow, where those of mixed signs hide it
    grad_out = torch.randn(case.rows["q"].shape)
    want = case.run_with_grads(grad_out, impl="reference")
    exact = case.to(torch.float64).run_with_grads(grad_out.double(), impl="reference")
    assert_as_right_as(case.run_isa(grad_out, isa), want, exact)


@pytest.mark.parametrize("impl", ["reference", pytest.param("fused", marks=pytest.mark.needs_ext)])
def test_equals_the_definition(impl, device):
    case = make([3, 2], [2], dtype=torch.float64, heads=1)
    if impl == "fused" and _gpu.runs_cuda(case.offsets.to(device)):
        pytest.skip("CUDA kernels take no float64")
    q, k, v, pk, pv = (x.detach()[:, 0].to(device) for x in case.rows.values())
    moved = [x[:, None] for x in (q, k, v)]
    got = ops.prompt_attention(
        *moved, case.offsets.to(device), pk[:, None], pv[:, None], case.prefix_offsets.to(device), impl=impl
    )
    for row, (begin, end) in enumerate([(0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]):
        keys, values = torch.cat([pk, k[begin:end]]), torch.cat([pv, v[begin:end]])
        weights = (keys @ q[row] / 4).exp()
        torch.testing.assert_close(got[row, 0], weights @ values / weights.sum())


@pytest.mark.needs_ext
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["plain", "some see none", "all empty"])
def test_gradcheck(name, causal):
    case = make(*CASES[name], dim=3, dtype=torch.float64)
    given = [n for n, x in case.rows.items() if x is not None]

    def run(*rows):
        return replace(case, rows={**case.rows, **dict(zip(given, rows))}).run(causal=causal, impl="fused")

    assert torch.autograd.gradcheck(run, [case.rows[n] for n in given])


@pytest.mark.needs_ext
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["plain", "some see none", "no histories"])
def test_opcheck(name, grad):
    case = make(*CASES[name], dim=4)
    plan = ops.attention_plan(case.offsets, case.prefix_offsets, case.prefix_index)
    rows = [None if x is None else x.detach().requires_grad_(grad) for x in case.rows.values()]
    args = (*rows, plan.work, plan.batch, plan.num_prefixes, True, 0.5)
    torch.library.opcheck(torch.ops.pcl_ext.prompt_attention.default, args)


@pytest.mark.needs_ext
def test_a_plan_of_other_offsets_does_no_harm_where_it_is_compiled():
    """Values cannot be compared there, so that it is not believed."""
    q, k, v = torch.randn(3, 8, 2, 16).unbind()
    plan, offsets = ops.attention_plan(torch.tensor([0, 6, 8])), torch.tensor([0, 1, 8])
    with pytest.raises(ValueError, match="plan must be made from the same offsets"):
        ops.prompt_attention(q, k, v, offsets, plan=plan)
    compiled = torch.compile(lambda *rows: ops.prompt_attention(*rows, plan=plan), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, offsets), ops.prompt_attention(q, k, v, offsets))


@pytest.mark.needs_ext
@pytest.mark.parametrize("planned", [True, False])
def test_compiles_as_one_graph(planned):
    case = make(*CASES["some see none"])
    plan = ops.attention_plan(case.offsets, case.prefix_offsets, case.prefix_index) if planned else None

    def step(q, k, v, prefix_k, prefix_v):
        out = ops.prompt_attention(
            2 * q, k, v, case.offsets, prefix_k, prefix_v, case.prefix_offsets, case.prefix_index, plan=plan
        )
        return out.square().sum()

    rows = list(case.rows.values())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = torch.autograd.grad(compiled(*rows), rows), torch.autograd.grad(step(*rows), rows)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_give_the_same_bits(dtype):
    heads, dim = 3, 16
    offsets = torch.tensor([0, 5, 14])
    fused = torch.randn(14, 3, heads, dim, dtype=dtype)
    views = fused.unbind(1)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    slanted = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]  # the last dimension is not contiguous
    want = ops.prompt_attention(*(x.contiguous() for x in views), offsets, impl="fused")
    for rows in (views, transposed, slanted):
        assert torch.equal(ops.prompt_attention(*rows, offsets, impl="fused"), want)


@pytest.mark.needs_ext
def test_expanded_gradient():
    case = make([5, 9], [3])
    rows = list(case.rows.values())
    summed = torch.autograd.grad(case.run(impl="fused").sum(), rows)
    ones = case.run_with_grads(torch.ones(14, 2, 16), impl="fused")
    torch.testing.assert_close(summed, tuple(ones[n] for n in case.rows), rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("asked", [["prefix_k", "prefix_v"], ["q"], ["k"], ["v"], ["prefix_v"], ["q", "prefix_k"]])
def test_only_what_is_asked_for(asked):
    case = make(*CASES["several chunks"])
    grad_out = torch.randn(case.rows["q"].shape)
    want = case.run_with_grads(grad_out, impl="fused")
    for name, rows in case.rows.items():
        rows.requires_grad_(name in asked)
    grads = torch.autograd.grad(case.run(impl="fused"), [case.rows[n] for n in asked], grad_out)
    for name, grad in zip(asked, grads):
        assert torch.equal(grad, want[name]), name


@pytest.mark.needs_ext
def test_backward_allocates_only_what_is_asked_for():
    case = make([5, 9], [3])
    plan = ops.attention_plan(case.offsets, case.prefix_offsets)
    rows, numbers = [x.detach() for x in case.rows.values()], (2, 1, True, 0.25)
    out, lse = prompt_attention_op.forward(*rows, plan.work, *numbers)
    needs = [False, False, False, True, True]
    grads = prompt_attention_op.backward(out, *rows, plan.work, out, lse, *numbers, needs)
    assert [g.numel() for g in grads] == [0, 0, 0, 3 * 32, 3 * 32]


def test_autocast_runs_in_bfloat16():
    case = make([5, 9], [3])
    want = case.to(torch.bfloat16).run()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    got.float().sum().backward()
    assert case.rows["prefix_k"].grad.dtype == torch.float32


def test_half_precision_takes_the_reference():
    case = make([5, 9], [3], dtype=torch.float16)
    assert torch.equal(case.run(), case.run(impl="reference"))
    with pytest.raises((TypeError, RuntimeError), match="impl='fused'"):
        case.run(impl="fused")


def test_prefix_k_alone_has_no_effect_on_prefixless_histories():
    case = make([5, 6], [3], [-1, -1])
    plain = Case({**case.rows, "prefix_k": None, "prefix_v": None}, case.offsets, None, None)
    assert torch.equal(case.run(), plain.run())


def test_reference_gives_zero_gradients_to_unseen_prefixes():
    case = make([5, 6], [3, 4], [1, -1])
    grads = case.run_with_grads(torch.randn(11, 2, 16), impl="reference")
    assert not grads["prefix_k"][:3].any()
    assert grads["prefix_k"][3:].any()
