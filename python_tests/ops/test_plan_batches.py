"""plan_batches: every row once, within the limit, balanced, the same for the same seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcl_ext import ops

IMPLS = ["reference", pytest.param("fused", marks=pytest.mark.needs_ext)]


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 80), st.integers(0, 5))
def test_every_row_once_within_the_limit(impl, lengths, max_tokens, seed):
    batches = ops.plan_batches(torch.tensor(lengths, dtype=torch.int64), max_tokens, seed=seed, impl=impl)
    rows = [r for batch in batches for r in batch.tolist()]
    assert sorted(rows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.dtype == torch.int64
        tokens = sum(max(lengths[r], 1) for r in batch.tolist())
        assert tokens <= max_tokens or len(batch) == 1


@pytest.mark.needs_ext
@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 80), st.integers(0, 5))
def test_fused_equals_the_twin(lengths, max_tokens, seed):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    got, want = (ops.plan_batches(lengths, max_tokens, seed=seed, impl=i) for i in ("fused", "reference"))
    assert [b.tolist() for b in got] == [b.tolist() for b in want]


def test_little_imbalance():
    lengths = torch.randint(1, 200, (2000,))
    tokens = torch.tensor([float(lengths[b].sum()) for b in ops.plan_batches(lengths, 4096)])
    assert len(tokens) <= 1.05 * lengths.sum() / 4096 + 1
    assert tokens.min() > 0.95 * tokens.max()


def test_seeds():
    lengths = torch.randint(1, 200, (300,))
    first, again, other = (ops.plan_batches(lengths, 1000, seed=s) for s in (3, 3, 4))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in other]


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    ops.plan_batches(torch.tensor([1, 2, 3]), 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.needs_ext
def test_a_million_users():
    lengths = torch.randint(0, 200, (1_000_000,))
    batches = ops.plan_batches(lengths, 65536)
    assert sum(map(len, batches)) == 1_000_000


MISTAKES = [
    ("lengths", [1, 2], TypeError, "lengths must be a Tensor, got list"),
    ("lengths", torch.tensor([1, 2], dtype=torch.int32), TypeError, "lengths must be int64, got int32"),
    ("lengths", torch.tensor([[1]]), ValueError, "lengths must have 1 dimensions"),
    ("lengths", torch.tensor([3, -1]), ValueError, "lengths must be at least 0, got -1 at index 1"),
    ("lengths", torch.tensor([1]).to("meta"), ValueError, "lengths must be on the cpu, got meta"),
    ("max_tokens", 0, ValueError, "max_tokens must be at least 1, got 0"),
    ("max_tokens", "8", TypeError, "max_tokens must be an int, got str"),
    ("seed", -1, ValueError, "seed must be at least 0, got -1"),
    ("seed", None, TypeError, "seed must be an int, got NoneType"),
    ("impl", "quick", ValueError, "impl must be one of"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_named(name, value, error, message, impl):
    right = {"lengths": torch.tensor([3, 1]), "max_tokens": 4, "impl": impl}
    with pytest.raises(error, match=message):
        ops.plan_batches(**{**right, name: value})


def test_another_default_device_is_no_matter():
    lengths = torch.randint(1, 200, (100,))
    want = ops.plan_batches(lengths, 1000)
    with torch.device("meta"):
        got = ops.plan_batches(lengths, 1000)
        rows = ops.plan_batches(lengths, 1000, impl="reference")
    assert [b.tolist() for b in got] == [b.tolist() for b in want] == [b.tolist() for b in rows]
