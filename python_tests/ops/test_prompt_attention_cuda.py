"""The CUDA kernels of prompt_attention, on a GPU or emulated: as right as the twin, whatever they are given."""

import sys

import pytest
import torch
from attention_cases import CASES, INPUTS, Case, make
from cuda_cases import DTYPES, LEAST, MOST, OFFSETS, TOTAL, compare, on, some_grad

from pcl_ext import ops
from pcl_ext.ops import _gpu, prompt_attention_op
from pcl_ext.ops.attention_plan import cuda_list


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_right_as_the_twin(name, dtype, cuda):
    compare(make(*CASES[name], dtype=dtype), cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "some see none", "longer than a block"])
def test_not_causal(name, dtype, cuda):
    compare(make(*CASES[name], dtype=dtype), cuda, causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", range(16, 129, 16))
def test_every_head_width(dim, dtype, cuda):
    compare(make([5, 40], [7, 18], [0, 1], dim=dim, heads=1, dtype=dtype), cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", range(16, 129, 16))
def test_one_short_prefix_of_every_head_width(dim, dtype, cuda):
    compare(make([5, 40, 0, 70, 2], [16 if dim % 32 else 9], [0, 0, 0, 0, -1], dim=dim, dtype=dtype), cuda)


def test_many_histories_find_their_prefixes(cuda):
    generator = torch.Generator().manual_seed(0)
    lengths, index = (
        torch.randint(0, 4, (1500,), generator=generator),
        torch.randint(-1, 5, (1500,), generator=generator),
    )
    compare(make(lengths.tolist(), [3, 18, 0, 1, 7], index.tolist(), dim=16, heads=1, dtype=torch.bfloat16), cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prefix_longer_than_fits(dtype, cuda):
    compare(make([3, 9, 20], [70, 5], [0, 1, 0], dtype=dtype), cuda)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_of_one_prefix(dtype, cuda):
    compare(make([70, 0, 3, 130, 17, 80], [11], dtype=dtype, heads=1), cuda)


def test_one_long_history_among_short_ones(cuda):
    compare(make([3, 1100, 9], [5], heads=1, dtype=torch.bfloat16), cuda)


@pytest.mark.parametrize("causal", [True, False])
def test_groups_of_slots_begin_and_end_inside_histories(causal, cuda):
    lengths, index = [200, 0, 16, 1, 64, 0, 0, 130, 5, 65], [1, 0, 0, 2, 0, 0, 1, -1, 2, 1]
    compare(make(lengths, [16, 90, 0], index, dtype=torch.bfloat16), cuda, causal=causal)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(scale, cuda):
    compare(make(*CASES["some see none"], dtype=torch.bfloat16), cuda, scale=scale)


def test_large_scores_do_not_overflow(cuda):
    case = make([9, 30], [4])
    with torch.no_grad():
        case.rows["q"] *= 300
    compare(case, cuda)


@pytest.mark.parametrize("scale", [0.5, -0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_grow_from_key_to_key(dtype, scale, cuda):
    """Each of 40 keys has a score 4 above the one before: weights of the first may not become too large."""
    case = make([40, 3], [16], dtype=dtype, heads=1)
    with torch.no_grad():
        for name, first in (("prefix_k", 0), ("k", 16)):
            rows = case.rows[name]
            rows.zero_()[:, 0, 0] = (first + torch.arange(len(rows)).to(dtype)) * (8 * scale)
        case.rows["q"][..., 0] = 2
    compare(case, cuda, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_values_come_out_as_they_are(dtype, cuda):
    """Whatever the weights: what they are divided by is the sum of what values are multiplied by."""
    case = make([40, 3], [16], dtype=dtype)
    with torch.no_grad():
        case.rows["q"] *= 4
        case.rows["v"].fill_(1)
        case.rows["prefix_v"].fill_(1)
    out = on(case, cuda).run(impl="fused")
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e7, -1e12, 1e30, -1e36])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_whose_last_bit_is_more_than_a_weight_can_be(dtype, scale, cuda):
    """A score is then subtracted as it was rounded, or the largest weight would be infinite or 0."""
    case = on(make([40, 3], [18], dtype=dtype, heads=1), cuda)
    got, want = (case.run(scale=scale, impl=impl) for impl in ("fused", "reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_that_is_no_number_gives_none(dtype, cuda):
    case = on(make([20, 3], [5], dtype=dtype), cuda)
    assert case.run(scale=float("nan"), impl="fused").isnan().all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_history(dtype, name, value, cuda):
    """Of two histories with a prefix each, in one group; the other's numbers have the same bits as before."""
    case = on(make([20, 9], [5, 7], [0, 1], dtype=dtype), cuda)
    grad_out = some_grad(case)
    want = case.run_with_grads(grad_out, impl="fused")
    with torch.no_grad():
        case.rows[name][3] = value
    got = case.run_with_grads(grad_out, impl="fused")
    for row, rows in got.items():
        begin = 5 if row.startswith("prefix") else 20
        assert torch.equal(rows[begin:], want[row][begin:])
    assert not got["out"][:20].isfinite().all() or name.endswith("k")


@pytest.mark.parametrize(
    "asked", [("q",), ("k", "q"), ("v",), ("prefix_k",), ("prefix_k", "prefix_v"), ("prefix_v", "k")]
)
def test_only_what_is_asked_for(asked, cuda):
    case = on(make(*CASES["some see none"], dtype=torch.bfloat16), cuda)
    grad_out = some_grad(case)
    want = case.run_with_grads(grad_out, impl="fused")
    for name in set(INPUTS) - set(asked):
        case.rows[name].requires_grad_(False)
    got = torch.autograd.grad(case.run(impl="fused"), [case.rows[n] for n in asked], grad_out)
    for name, grad in zip(asked, got):
        assert torch.equal(grad, want[name])


@pytest.mark.parametrize(
    "asked", [("q", "prefix_k"), ("q", "prefix_v"), ("q", "v", "prefix_k", "prefix_v"), ("k", "v")]
)
@pytest.mark.parametrize("name", ["shared prefix", "longer than a block"])
def test_the_same_whatever_else_is_asked_for(name, asked, cuda):
    case = on(make(*CASES[name], dtype=torch.bfloat16), cuda)
    grad_out = some_grad(case)
    want = case.run_with_grads(grad_out, impl="fused")
    for rows in case.rows.values():
        rows.requires_grad_(False)
    inputs = [case.rows[n].requires_grad_() for n in asked]
    for name, grad in zip(asked, torch.autograd.grad(case.run(impl="fused"), inputs, grad_out)):
        assert torch.equal(grad, want[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_company_does_not_change_bits(dtype, cuda):
    case = on(make([9, 30], [5], dtype=dtype), cuda)
    more = on(make([40, 9, 30, 3], [7, 5], [0, 1, 1, -1], dtype=dtype), cuda)
    for name, rows in case.rows.items():
        own = slice(7, 12) if name.startswith("prefix") else slice(40, 79)
        more.rows[name].data[own] = rows.data
    grad_out = some_grad(more)
    got = more.run_with_grads(grad_out, impl="fused")
    want = case.run_with_grads(grad_out[40:79], impl="fused")
    for name in ("out", "q", "k", "v"):
        assert torch.equal(got[name][40:79], want[name])


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_threads_does_not_change_bits(order, cuda):
    if cuda != "cpu":
        pytest.skip("a GPU chooses its own order")
    case = make([70, 3, 130], [11], heads=1, dtype=torch.bfloat16)
    grad_out = some_grad(case)
    want = case.run_with_grads(grad_out, impl="fused")
    with _gpu.emulated(order):
        got = case.run_with_grads(grad_out, impl="fused")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_give_the_same_bits(dtype, cuda):
    offsets = torch.tensor([0, 5, 14], device=cuda)
    for columns in (16, 19):  # rows at multiples of 16 bytes, and not
        rows = torch.randn(14, 3, 2, columns).to(cuda, dtype)[..., :16]
        strided = [x.requires_grad_() for x in rows.unbind(1)]
        packed = [x.detach().contiguous().requires_grad_() for x in strided]
        grad_out = torch.randn(14, 2, columns).to(cuda, dtype)[..., :16]
        got, want = (ops.prompt_attention(*x, offsets, impl="fused") for x in (strided, packed))
        assert torch.equal(got, want)
        grads = torch.autograd.grad(got, strided, grad_out), torch.autograd.grad(want, packed, grad_out.contiguous())
        assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_hooks_give_back_may_lie_anywhere(dtype, cuda):
    """Of saved tensors: off by one number from where 16 bytes begin."""

    def elsewhere(x):
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.is_floating_point() else x

    case = on(make([20, 9], [5], dtype=dtype), cuda)
    grad_out = some_grad(case)
    want = case.run_with_grads(grad_out, impl="fused")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, elsewhere):
        got = case.run_with_grads(grad_out, impl="fused")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("index", [[0, 1, 0], [MOST, LEAST, 2], [-2, 1, 5]], ids=str)
@pytest.mark.parametrize("name", OFFSETS)
def test_hostile_values_stay_inside(name, index, cuda):
    rows = {n: torch.randn(TOTAL, 1, 16).to(cuda, torch.bfloat16).requires_grad_() for n in INPUTS}
    prefix_offsets = torch.tensor([OFFSETS[name][0], *OFFSETS[name][2:]], device=cuda)
    layout = (torch.tensor(OFFSETS[name], device=cuda), prefix_offsets, torch.tensor(index, device=cuda))
    guards = {n: x.detach().clone() for n, x in rows.items()}
    Case(rows, *layout).run_with_grads(torch.ones(TOTAL, 1, 16), impl="fused")
    assert all(torch.equal(rows[n], guard) for n, guard in guards.items())


@pytest.mark.parametrize("number", [MOST, LEAST, 2, 3], ids=str)
def test_hostile_members_stay_inside(number, cuda):
    case = on(make([40, 9, 3], [5, 18], [1, 0, 1], dtype=torch.bfloat16), cuda)
    work = cuda_list(case.offsets, case.prefix_offsets, case.prefix_index)
    rows = [x.detach() for x in case.rows.values()]
    guards, sizes = [x.clone() for x in rows], (3, 2, True, 0.25)
    out, stats = prompt_attention_op.forward(*rows, work, *sizes)
    members = len(work) - (3 + 3 + 3)  # of histories, their runs, where they begin
    for part in (slice(members, members + 3), slice(members + 3, members + 6), slice(members + 6, None)):
        hostile = work.clone()
        hostile[part] = number
        prompt_attention_op.backward(out, *rows, hostile, out, stats, *sizes, [True] * 5)
    assert all(map(torch.equal, rows, guards))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefixes", [[40, 0, 3, 18, 5], [16, 0, 3]], ids=str)
def test_a_prefix_that_nobody_sees_gets_zeros(prefixes, dtype, cuda):
    case = on(make([5, 70, 130], prefixes, [0, 2, 0], dtype=dtype, heads=1), cuda)
    got = case.run_with_grads(some_grad(case), impl="fused")
    begin, end = sum(prefixes[:3]), sum(prefixes)
    for name in ("prefix_k", "prefix_v"):
        assert got[name][:begin].any(1).any(1).all()
        assert not got[name][begin:end].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [[0, 9, 48], [3, 12, 51], [0], [70]], ids=str)
def test_rows_of_no_history_are_zeros(offsets, dtype, cuda):
    """Of more rows than the histories have, as in a captured graph: they give 0, and so do their gradients."""
    first, last = offsets[0], offsets[-1]
    fewer = on(make([70], [16], dtype=dtype), cuda)
    grad_out = some_grad(fewer)
    fewer.offsets = torch.tensor(offsets, device=cuda)
    own = {n: x if n.startswith("prefix") else x.detach()[first:last] for n, x in fewer.rows.items()}
    case = on(Case(own, fewer.offsets - first, fewer.prefix_offsets, None), cuda)
    got, want = fewer.run_with_grads(grad_out, impl="fused"), case.run_with_grads(grad_out[first:last], impl="fused")
    for name in ("out", "q", "k", "v"):
        assert torch.equal(got[name][first:last], want[name])
        assert not got[name][:first].any()
        assert not got[name][last:].any()
    for name in ("prefix_k", "prefix_v"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_no_prefix_get_no_gradient(dtype, cuda):
    case = on(make([9, 4], [16], dtype=dtype), cuda)
    case.prefix_offsets = torch.tensor([2, 12], device=cuda)
    got = case.run_with_grads(some_grad(case), impl="fused")
    for name in ("prefix_k", "prefix_v"):
        assert got[name][2:12].any(1).all()
        assert not got[name][:2].any()
        assert not got[name][12:].any()


def test_a_single_row_or_head_has_no_stride():
    """It may be any, and what kernels add to an address is to be a multiple of 16 bytes."""
    x = torch.empty(64)
    assert prompt_attention_op._strides(x.as_strided((1, 1, 16), (7, 3, 1))) == [0, 0]
    assert prompt_attention_op._strides(x.as_strided((1, 2, 16), (7, 16, 1))) == [0, 16]


def test_other_head_widths_take_the_twin(cuda):
    case = on(make([5, 3], dim=20), cuda)
    assert torch.equal(case.run(), case.run(impl="reference"))
    with pytest.raises(ValueError, match="multiples of 16 up to 128 on CUDA, got 20"):
        case.run(impl="fused")


@pytest.mark.parametrize(("dim", "dtype"), [(20, torch.bfloat16), (144, torch.float16), (16, torch.float64)], ids=str)
def test_what_no_kernel_takes_is_refused_below_the_op_too(dim, dtype, cuda):
    case = on(make([5, 3], [4], dim=dim, dtype=dtype), cuda)
    rows = [x.detach() for x in case.rows.values()]
    work, rest = cuda_list(case.offsets, case.prefix_offsets, None), (2, 1, True, 1.0)
    with pytest.raises(RuntimeError, match="prompt_attention_fwd could not be launched .* CUDA error 1, "):
        torch.ops.pcl_ext.prompt_attention(*rows, work, *rest)
    out, stats = torch.zeros_like(rows[0]), torch.zeros(8, 2, 2, device=rows[0].device)
    stats = stats.double() if dtype == torch.float64 else stats
    with pytest.raises(RuntimeError, match="prompt_attention_bwd could not be launched .* CUDA error 1, "):
        torch.ops.pcl_ext.prompt_attention_backward(rows[0], *rows, work, out, stats, *rest, [True] * 5)


@pytest.mark.parametrize("plan", [True, False], ids=["planned", "not planned"])
def test_the_twin_needs_no_work_list(plan, cuda, monkeypatch):
    case = on(make([5, 3], [4]), cuda)
    plan = ops.attention_plan(case.offsets, case.prefix_offsets) if plan else None
    want = case.run(plan=plan, impl="reference")
    for name in ("work_list", "cuda_list"):
        monkeypatch.setattr(sys.modules["pcl_ext.ops.prompt_attention"], name, None)
    assert torch.equal(case.run(plan=plan, impl="reference"), want)


@pytest.mark.parametrize("made", ["cpu", "there"])
def test_plan_gives_the_same_bits(made, cuda):
    case = on(make(*CASES["some see none"], dtype=torch.bfloat16), cuda)
    layout = (case.offsets, case.prefix_offsets, case.prefix_index)
    plan = ops.attention_plan(*(x.to(cuda if made == "there" else made) for x in layout)).to(cuda)
    grad_out = some_grad(case)
    got, want = (case.run_with_grads(grad_out, plan=given, impl="fused") for given in (plan, None))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("planned", [True, False])
def test_compiles_as_one_graph(planned, cuda):
    case = on(make(*CASES["some see none"], dtype=torch.bfloat16), cuda)
    plan = ops.attention_plan(case.offsets, case.prefix_offsets, case.prefix_index) if planned else None
    rows = list(case.rows.values())

    def step(*rows):
        given = Case(dict(zip(INPUTS, rows)), case.offsets, case.prefix_offsets, case.prefix_index)
        return given.run(plan=plan, impl="fused").float().square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = torch.autograd.grad(compiled(*rows), rows), torch.autograd.grad(step(*rows), rows)
    assert all(map(torch.equal, got, want))


@pytest.mark.gpu
def test_graph_replay_and_another_stream():
    case = on(make(*CASES["some see none"], dtype=torch.bfloat16), "cuda")
    grad_out, side = some_grad(case), torch.cuda.Stream()
    want = case.run_with_grads(grad_out, impl="fused")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = case.run_with_grads(grad_out, impl="fused")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run_with_grads(grad_out, impl="fused")
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in want.items():
        assert torch.equal(again[name], tensor)
        assert torch.equal(got[name], tensor)


def test_a_plan_of_another_device_is_refused():
    case = make([5, 3])
    plan = ops.attention_plan(case.offsets)
    rows = [case.rows[name].to("meta") for name in ("q", "k", "v")]
    with pytest.raises(ValueError, match="plan must be on the device of q, got cpu and meta"):
        ops.prompt_attention(*rows, case.offsets.to("meta"), plan=plan)
