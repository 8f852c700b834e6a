"""newest_attention gives each history's newest row what prompt_attention gives it, in any company."""

import pytest
import torch
from attention_cases import make
from test_prefix_sharing import IMPLS, as_right_as
from test_prompt_attention import assert_as_right_as
from test_prompt_attention_cuda import on

from pcl_ext import ops

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
