"""newest_attention gives each history's newest row what prompt_attention gives it, in any company."""

import pytest
import torch
from attention_cases import IMPLS, as_right_as, assert_as_right_as, make
from cuda_cases import on
from torch.autograd import forward_ad

from pcl_ext import ops
from pcl_ext.ops import _native, prompt_attention_op

ISAS = range(len(_native.C.isas())) if ops.has_fused() else []
LENGTHS = [5, 0, 33, 1, 18, 2, 0]
PREFIXES = {
    "none": ([], None),
    "shared": ([16], None),
    "chosen": ([16, 0, 300], [2, 0, -1, 2, 1, 0, 0]),
}


def rows_of(case, names=("q", "k", "v", "prefix_k", "prefix_v")):
    return [case.rows.get(name) for name in names]


def newest_of(case, impl):
    """The op on a case's rows, and all rows of prompt_attention at the newest places."""
    q, k, v, prefix_k, prefix_v = rows_of(case)
    newest = case.offsets[1:][case.offsets.diff() > 0] - 1
    shared = () if prefix_k is None else (prefix_k, prefix_v, case.prefix_offsets, case.prefix_index)
    got = ops.newest_attention(q[newest], k, v, case.offsets, *shared, impl=impl)
    return got, ops.prompt_attention(q, k, v, case.offsets, *shared, impl="reference")[newest]


def case_of(prefix):
    lengths, index = PREFIXES[prefix]
    return make(LENGTHS, lengths, index, dim=32) if lengths else make(LENGTHS, dim=32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_equals_prompt_attention(prefix, dtype, impl):
    case = case_of(prefix).to(dtype)
    with torch.no_grad():
        got, reference = newest_of(case, impl)
        exact = newest_of(case.to(torch.float64), "reference")[1]
    as_right_as(got, reference, exact)


def inputs_of(case, plan):
    """What the kernel of the newest rows takes, and the same with all queries, which prompt_attention's takes."""
    q, *rows = (None if x is None else x.detach() for x in rows_of(case))
    numbers = (*rows, plan.work, plan.batch, plan.num_prefixes)
    newest = case.offsets[1:][case.offsets.diff() > 0] - 1
    return (q[newest], *numbers, 0.25), (q, *numbers, True, 0.25), newest


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [16, 40])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_on_the_cpu_it_has_the_bits_of_prompt_attention(prefix, dim, isa, dtype):
    lengths, index = PREFIXES[prefix]
    lengths_of_all = [*LENGTHS, 300, 7, 12, 1030, 1043]  # the last two end just past 1,024 columns, where sums are cut
    index = None if index is None else [*index, 0, 2, 2, 0, 2]
    case = make(lengths_of_all, lengths or None, index, dim=dim, dtype=dtype)
    plan = ops.attention_plan(case.offsets, case.prefix_offsets, case.prefix_index)
    ours, all_rows, newest = inputs_of(case, plan)
    want = prompt_attention_op._fill(*all_rows, 0, isa)[newest]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(prompt_attention_op.newest(*ours, isa=isa), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_plan_changes_nothing(prefix, learns, impl):
    case = case_of(prefix)
    q, k, v, prefix_k, prefix_v = rows_of(case)
    call = {"q": q[case.offsets[1:][case.offsets.diff() > 0] - 1], "k": k, "v": v, "offsets": case.offsets}
    layout = {"offsets": case.offsets}
    if prefix_k is not None:
        layout |= {"prefix_offsets": case.prefix_offsets, "prefix_index": case.prefix_index}
        call |= {**layout, "prefix_k": prefix_k, "prefix_v": prefix_v}
    with torch.set_grad_enabled(learns):
        want = ops.newest_attention(**call, impl=impl)
        assert torch.equal(ops.newest_attention(**call, plan=ops.attention_plan(**layout), impl=impl), want)
        copied = {name: None if x is None else x.clone() for name, x in layout.items()}
        assert torch.equal(ops.newest_attention(**call, plan=ops.attention_plan(**copied), impl=impl), want)


@pytest.mark.needs_ext
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 2, 16)}, r"q must be \[m, H, d\], m histories that are not empty = \(3, 2, 16\)"),
        ({"q": torch.randn(3, 1, 16)}, r"k must be \[T, H, d\]"),
        ({"q": torch.randn(3, 2, 16).double()}, "k must have the dtype of q"),
        ({"plan": ops.attention_plan(torch.tensor([0, 2, 4, 4, 5]))}, "plan must be made from the same offsets"),
        ({"plan": ops.attention_plan(torch.tensor([0, 2, 3]))}, "plan must be made from the same offsets"),
        ({"k": torch.randn(6, 2, 16), "v": torch.randn(6, 2, 16)}, r"offsets must end at len\(k\) = 6, got 5"),
        ({"plan": 1}, "plan must be an AttentionPlan"),
    ],
    ids=str,
)
def test_a_plan_does_not_hide_mistakes(change, message):
    call = {"q": torch.randn(3, 2, 16), "offsets": torch.tensor([0, 2, 3, 3, 5])}
    call |= {n: torch.randn(5, 2, 16) for n in "kv"}
    call["plan"] = ops.attention_plan(call["offsets"])
    ops.newest_attention(**call)
    with pytest.raises((ValueError, TypeError), match=message):
        ops.newest_attention(**(call | change))


@pytest.mark.needs_ext
@pytest.mark.parametrize("prefix", ["none", "chosen"])
def test_it_is_one_op_of_torch(prefix):
    case = case_of(prefix)
    inputs = inputs_of(case, ops.attention_plan(case.offsets, case.prefix_offsets, case.prefix_index))[0]
    torch.library.opcheck(torch.ops.pcl_ext.newest_attention, inputs)
    with pytest.raises(TypeError, match="got float16"):
        torch.ops.pcl_ext.newest_attention(*(x.half() if x is not None else x for x in inputs[:5]), *inputs[5:])


@pytest.mark.needs_ext
@pytest.mark.parametrize("planned", [False, True])
def test_compiles_in_one_graph(planned):
    case = case_of("shared")
    q, k, v, prefix_k, prefix_v = (x.detach() for x in rows_of(case))
    inputs = (q[[4, 37, 38, 56, 58]], k, v, case.offsets, prefix_k, prefix_v, case.prefix_offsets)
    plan = ops.attention_plan(case.offsets, case.prefix_offsets) if planned else None
    compiled = torch.compile(lambda *rows: ops.newest_attention(*rows, plan=plan), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ops.newest_attention(*inputs))


@pytest.mark.needs_ext
def test_a_tangent_is_not_dropped_in_silence():
    q, k, v = (x.detach() for x in rows_of(case_of("none"), ("q", "k", "v")))
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        ops.newest_attention(q[:5], k, forward_ad.make_dual(v, v), case_of("none").offsets)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_gradients_are_those_of_prompt_attention(prefix, impl):
    case = case_of(prefix)
    exact_case = case.to(torch.float64)
    (got, reference), exact = newest_of(case, impl), newest_of(exact_case, "reference")[1]
    grad = torch.randn(got.shape)
    inputs, exact_inputs = ([x for x in rows_of(c) if x is not None] for c in (case, exact_case))
    for ours, theirs, right in zip(
        torch.autograd.grad(got, inputs, grad),
        torch.autograd.grad(reference, inputs, grad),
        torch.autograd.grad(exact, exact_inputs, grad.double()),
    ):
        as_right_as(ours, theirs, right)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_values_that_nobody_looks_at_cost_nothing(dtype):
    """The newest row and the prefix are far below the row before in score, and their values far above."""
    key = torch.tensor([0.0, -50.0]).view(2, 1, 1).expand(2, 1, 16).to(dtype)
    value = torch.tensor([1.0, 1e8]).view(2, 1, 1).expand(2, 1, 16).to(dtype)
    shared = (key[1:], value[1:], torch.tensor([0, 1]))
    got = ops.newest_attention(torch.ones(1, 1, 16, dtype=dtype), key, value, torch.tensor([0, 2]), *shared)
    assert torch.equal(got, torch.ones_like(got))


@pytest.mark.needs_ext
def test_scores_far_apart_do_not_overflow():
    case = case_of("chosen")
    with torch.no_grad():
        case.rows["q"].mul_(1e3)
        got, want = newest_of(case, "fused")
    torch.testing.assert_close(got, want)


@pytest.mark.needs_ext
def test_a_history_has_the_same_bits_in_any_company():
    case = case_of("chosen")
    q, k, v, prefix_k, prefix_v = (x.detach() for x in rows_of(case))
    newest = case.offsets[1:][case.offsets.diff() > 0] - 1
    shared = (prefix_k, prefix_v, case.prefix_offsets)
    together = ops.newest_attention(q[newest], k, v, case.offsets, *shared, case.prefix_index)
    place = 0
    for b, (begin, end) in enumerate(zip(case.offsets[:-1].tolist(), case.offsets[1:].tolist())):
        if begin == end:
            continue
        own = slice(begin, end)
        alone = ops.newest_attention(
            q[end - 1 : end], k[own], v[own], torch.tensor([0, end - begin]), *shared, case.prefix_index[b : b + 1]
        )
        assert torch.equal(alone[0], together[place])
        place += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_on_cuda(prefix, dtype, cuda):
    case = on(case_of(prefix).to(dtype), cuda)
    names = [name for name, rows in case.rows.items() if rows is not None]

    def found(out, inputs):
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        return {"out": out.detach(), **dict(zip(names, grads))}

    inputs, exact_case = [case.rows[name] for name in names], case.to(torch.float64)
    got, reference = newest_of(case, "fused")
    exact = newest_of(exact_case, "reference")[1]
    exact = found(exact, [exact_case.rows[name] for name in names])
    assert_as_right_as(found(got, inputs), found(reference, inputs), exact)
    with torch.no_grad():
        assert torch.equal(newest_of(case, "fused")[0], got)


def test_more_queries_than_histories_on_cuda(cuda):
    rows = torch.randn(4, 2, 16, device=cuda)
    with pytest.raises(ValueError, match="m at most B and T"):
        ops.newest_attention(rows, rows, rows, torch.tensor([0, 1, 4], device=cuda))


@pytest.mark.parametrize("prefix", ["none", "shared"])
def test_a_head_has_a_width(prefix):
    q, k, v, *shared = (None if x is None else x.detach()[..., :0] for x in rows_of(case_of(prefix)))
    shared = () if prefix == "none" else (*shared, torch.tensor([0, 16]))
    with pytest.raises(ValueError, match="q must have a head width d of at least 1"):
        ops.newest_attention(q[:5], k, v, case_of(prefix).offsets, *shared)


def test_the_number_of_queries_must_fit():
    case = case_of("none")
    q, k, v = rows_of(case, ("q", "k", "v"))
    with pytest.raises(ValueError, match="q must"):
        ops.newest_attention(q, k, v, case.offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_k": torch.zeros(3, 1, 16)}, r"prefix_k must be \[M, H, d\]"),
        ({"prefix_v": torch.zeros(2, 2, 16)}, r"prefix_v must be \[M, H, d\]"),
        ({"prefix_v": torch.zeros(3, 2, 16, dtype=torch.float64)}, "prefix_v must have the dtype of q"),
        ({"prefix_v": None}, "come together or not at all"),
        ({"prefix_k": None}, "come together or not at all"),
        ({"offsets": torch.tensor([0, 4, 2, 5])}, "offsets must never decrease"),
        ({"offsets": torch.tensor([0, 2, 3, 4])}, r"offsets must end at len\(k\) = 5"),
        ({"prefix_offsets": torch.tensor([0, 4])}, r"prefix_offsets must end at len\(prefix_k\) = 3"),
        ({"prefix_index": torch.tensor([0, 1, 0])}, r"prefix_index must lie in -1\.\.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_mistakes_are_named(change, message, impl):
    call = {"q": torch.randn(3, 2, 16), "offsets": torch.tensor([0, 2, 3, 5]), "prefix_offsets": torch.tensor([0, 3])}
    call |= {n: torch.randn(5, 2, 16) for n in "kv"} | {n: torch.randn(3, 2, 16) for n in ("prefix_k", "prefix_v")}
    with pytest.raises((ValueError, TypeError), match=message):
        ops.newest_attention(**(call | change), impl=impl)
