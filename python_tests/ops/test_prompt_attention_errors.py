"""Every mistake in a call of prompt_attention or attention_plan is an error that names it; none ends the process."""

import pytest
import torch
from attention_cases import IMPLS, make

from pcl_ext import ops


def ids(*numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype)


# what replaces which argument of a right call, the error, what its message says
MISTAKES = [
    ("q", [1.0], TypeError, "q must be a Tensor, got list"),
    ("q", torch.zeros(8, 2, 16, dtype=torch.int64), TypeError, "q must be float32 or .* got int64"),
    ("q", torch.zeros(8, 32), ValueError, "q must have 3 dimensions, got shape .8, 32."),
    ("q", torch.zeros(8, 2, 0), ValueError, "q must have a head width d of at least 1"),
    ("q", torch.zeros(8, 2, 16).to_sparse(), TypeError, "q must be a dense strided tensor"),
    ("k", torch.zeros(8, 2, 16, dtype=torch.float64), TypeError, "k must have the dtype of q"),
    ("k", torch.zeros(7, 2, 16), ValueError, r"k must be \[T, H, d\] = .8, 2, 16., got .7, 2, 16."),
    ("v", torch.zeros(8, 2, 16, device="meta"), ValueError, "v must be on the device of q, got meta and cpu"),
    ("v", None, TypeError, "v must be a Tensor, got NoneType"),
    ("offsets", [0, 5, 8], TypeError, "offsets must be a Tensor"),
    ("offsets", ids(0, 5, 8, dtype=torch.int32), TypeError, "offsets must be int64, got int32"),
    ("offsets", ids(0, 5, 8)[None], ValueError, "offsets must have 1 dimensions"),
    ("offsets", ids(), ValueError, "offsets must hold at least one entry"),
    ("offsets", ids(1, 5, 8), ValueError, "offsets must start at 0, got 1"),
    ("offsets", ids(0, 9, 8), ValueError, "offsets must never decrease, got 9 then 8 at index 2"),
    ("offsets", ids(0, 5, 9), ValueError, r"offsets must end at len\(q\) = 8, got 9"),
    ("offsets", ids(0, -5, 8), ValueError, "offsets must never decrease, got 0 then -5 at index 1"),
    ("offsets", ids(0, 5, 2**62), ValueError, r"offsets must end at len\(q\) = 8"),
    ("offsets", ids(0, 5, 8).to("meta"), ValueError, "offsets must be on the device of q"),
    ("prefix_k", None, ValueError, "come together or not at all, got no prefix_k"),
    ("prefix_v", None, ValueError, "come together or not at all, got no prefix_v"),
    ("prefix_offsets", None, ValueError, "come together or not at all, got no prefix_offsets"),
    ("prefix_k", torch.zeros(5, 1, 16), ValueError, r"prefix_k must be \[M, H, d\] = .5, 2, 16., got .5, 1, 16."),
    ("prefix_v", torch.zeros(4, 2, 16), ValueError, r"prefix_v must be \[M, H, d\] = .5, 2, 16., got .4, 2, 16."),
    ("prefix_v", torch.zeros(5, 2, 16, dtype=torch.bfloat16), TypeError, "prefix_v must have the dtype of q"),
    ("prefix_offsets", ids(0, 3, 2), ValueError, "prefix_offsets must never decrease"),
    ("prefix_offsets", ids(0, 3, 6), ValueError, r"prefix_offsets must end at len\(prefix_k\) = 5, got 6"),
    ("prefix_offsets", ids(2, 3, 5), ValueError, "prefix_offsets must start at 0, got 2"),
    ("prefix_offsets", ids(0, 1, 2, 5), ValueError, "prefix_index may be left out only .* 3 prefixes and 2 histories"),
    ("prefix_index", ids(0, 2), ValueError, "prefix_index must lie in -1..1, got 2 at index 1"),
    ("prefix_index", ids(-2, 0), ValueError, "prefix_index must lie in -1..1, got -2 at index 0"),
    ("prefix_index", ids(0), ValueError, r"prefix_index must be \[B\] = .2,., got .1,."),
    ("prefix_index", ids(0, 1, dtype=torch.int32), TypeError, "prefix_index must be int64, got int32"),
    ("plan", "now", TypeError, "plan must be an AttentionPlan, got str"),
    ("impl", "fast", ValueError, "impl must be one of auto, fused, reference, got 'fast'"),
    ("scale", "big", TypeError, "scale must be a number or None, got str"),
    ("causal", 1, TypeError, "causal must be a bool, got int"),
]


def right_call():
    case = make([5, 3], [3, 2])
    rows = {n: x.detach() for n, x in case.rows.items()}
    return {**rows, "offsets": case.offsets, "prefix_offsets": case.prefix_offsets}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_named(name, value, error, message, impl):
    arguments = {"impl": impl, **right_call(), name: value}
    with pytest.raises(error, match=message):
        ops.prompt_attention(**arguments)


def test_index_without_prefix():
    call = right_call()
    rows = [call[n] for n in "qkv"]
    with pytest.raises(ValueError, match="prefix_index needs a prefix"):
        ops.prompt_attention(*rows, call["offsets"], prefix_index=ids(0, 0))
    with pytest.raises(ValueError, match="prefix_index needs a prefix"):
        ops.attention_plan(call["offsets"], prefix_index=ids(0, 0))


@pytest.mark.parametrize(
    ("offsets", "prefix_offsets", "message"),
    [
        (ids(0, 4, 8), ids(0, 3, 5), "the same offsets"),
        (ids(0, 5, 8), ids(0, 2, 5), "the same prefix_offsets"),
        (ids(0, 8), ids(0, 5), "the same offsets"),
        (ids(0, 5, 8), None, "the same prefix_offsets"),
    ],
)
def test_plan_of_another_batch(offsets, prefix_offsets, message):
    with pytest.raises(ValueError, match=message):
        ops.prompt_attention(**right_call(), plan=ops.attention_plan(offsets, prefix_offsets))


@pytest.mark.parametrize("impl", IMPLS)
def test_plan_of_another_index(impl):
    own = right_call()
    shared = own | {"prefix_offsets": ids(0, len(own["prefix_k"]))}
    for call, index in ((own, ids(1, 0)), (shared, ids(-1, 0))):
        plan = ops.attention_plan(call["offsets"], call["prefix_offsets"], index)
        ops.prompt_attention(**call, prefix_index=index, plan=plan, impl=impl)
        with pytest.raises(ValueError, match="the same prefix_index"):
            ops.prompt_attention(**call, plan=plan, impl=impl)
        left_out = ops.attention_plan(call["offsets"], call["prefix_offsets"])
        want = ops.prompt_attention(**call, impl=impl)
        assert torch.equal(ops.prompt_attention(**call, plan=left_out, impl=impl), want)
        assert torch.equal(ops.prompt_attention(**call, plan=left_out.to("cpu"), impl=impl), want)


def test_plan_of_other_totals():
    call = right_call()
    plan = ops.attention_plan(call["offsets"], call["prefix_offsets"])
    for name in ("q", "k", "v"):
        call[name] = call[name][:7]
    with pytest.raises(ValueError, match=r"offsets must end at len\(q\) = 7, got 8"):
        ops.prompt_attention(**call, plan=plan)


@pytest.mark.needs_ext
def test_a_plan_keeps_what_was_checked():
    call = right_call()
    plan = ops.attention_plan(call["offsets"], call["prefix_offsets"])
    want = ops.prompt_attention(**call, plan=plan)
    call["offsets"][1] = 10**12
    assert torch.equal(ops.prompt_attention(**call, plan=plan), want)


@pytest.mark.needs_ext
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_odd_numbers_stay_where_they_are(value):
    call = right_call()
    want = ops.prompt_attention(**call)
    call["q"][2, 0, 3] = value
    got = ops.prompt_attention(**call)
    touched = torch.zeros_like(got, dtype=torch.bool)
    touched[2, 0] = True
    assert got[2, 0].isnan().all()
    assert torch.equal(got[~touched], want[~touched])
