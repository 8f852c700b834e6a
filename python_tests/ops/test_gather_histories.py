"""gather_histories: from tensors, arrays and memory maps; mistakes."""

import numpy as np
import pytest
import torch
from attention_cases import to_offsets
from hypothesis import given, settings
from hypothesis import strategies as st

from pcl_ext import ops

IMPLS = ["reference", pytest.param("fused", marks=pytest.mark.needs_ext)]


def by_hand(values, offsets, rows, max_len, cut):
    parts = []
    for i, r in enumerate(rows):
        history = values[offsets[r] : offsets[r + 1]]
        history = history if cut is None else history[: cut[i]]
        parts.append(history[len(history) - min(len(history), max_len) :])
    return np.concatenate([values[:0], *parts]), np.cumsum([0] + [len(p) for p in parts])


@st.composite
def picks(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    rows = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12))
    cut = draw(st.none() | st.tuples(*(st.integers(0, lengths[r]) for r in rows)))
    return lengths, rows, draw(st.integers(0, 10)), cut


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None)
@given(picks())
def test_equals_the_definition(impl, pick):
    lengths, rows, max_len, cut = pick
    offsets = to_offsets(lengths).numpy()
    values = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    cut = None if cut is None else np.array(cut, dtype=np.int64)
    packed, packed_offsets = ops.gather_histories(
        values, offsets, np.array(rows, dtype=np.int64), max_len, cut, impl=impl
    )
    want, want_offsets = by_hand(values, offsets, rows, max_len, cut)
    assert packed.dtype == torch.int32
    assert packed.tolist() == want.tolist()
    assert packed_offsets.tolist() == want_offsets.tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("kind", ["tensor", "array", "memory map", "strided"])
def test_kinds_of_storage(kind, dtype, impl, tmp_path):
    offsets, rows = to_offsets([4, 0, 6]), torch.tensor([2, 0, 1, 2])
    values = np.arange(10, dtype=dtype)
    want = ops.gather_histories(values, offsets, rows, 3, impl="reference")
    if kind == "tensor":
        values = torch.from_numpy(values)
    elif kind == "memory map":
        np.save(tmp_path / "values.npy", values)
        values = np.load(tmp_path / "values.npy", mmap_mode="r")
    elif kind == "strided":
        values = np.repeat(values, 2)[::2]
    got = ops.gather_histories(values, offsets, rows, 3, impl=impl)
    assert got[0].dtype == (torch.int32 if dtype == np.int32 else torch.int64)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.needs_ext
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large(threads):
    torch.set_num_threads(threads)
    offsets = to_offsets(torch.randint(0, 300, (3000,)).tolist())
    values, rows = torch.randint(0, 99, (int(offsets[-1]),)), torch.randint(0, 3000, (2500,))
    got, want = (ops.gather_histories(values, offsets, rows, 200, impl=impl) for impl in ("fused", "reference"))
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_the_result_is_a_copy():
    values = torch.arange(4)
    packed, _ = ops.gather_histories(values, to_offsets([4]), torch.tensor([0]), 4)
    packed[0] = 9
    assert values[0] == 0


MISTAKES = [
    ("values", [1, 2], TypeError, "values must be a Tensor or a numpy array, got list"),
    ("values", torch.ones(10), TypeError, "values must be int32 or int64, got float32"),
    ("values", np.arange(10, dtype=">i4"), TypeError, "values must be int32 or int64, got >i4"),
    ("values", torch.ones(10, 1, dtype=torch.int64), ValueError, "values must have 1 dimension"),
    ("values", torch.ones(10, dtype=torch.int64, device="meta"), ValueError, "values must be on the cpu, got meta"),
    ("offsets", torch.tensor([0, 4, 10], dtype=torch.int32), TypeError, "offsets must be int64, got int32"),
    ("offsets", torch.tensor([0, 4, 11]), ValueError, r"offsets must run from 0 to len\(values\) = 10, got 0 to 11"),
    ("offsets", torch.tensor([1, 4, 10]), ValueError, "offsets must run from 0"),
    ("offsets", torch.tensor([0, 11, 10]), ValueError, "offsets must never decrease.* at row [01]"),
    ("offsets", torch.zeros(0, dtype=torch.int64), ValueError, "offsets must hold at least one entry"),
    ("rows", torch.tensor([0, 2]), ValueError, "rows must lie in 0..1, got 2 at index 1"),
    ("rows", torch.tensor([-1, 0]), ValueError, "rows must lie in 0..1, got -1 at index 0"),
    ("rows", torch.tensor([0.0]), TypeError, "rows must be int64, got float32"),
    ("cut", torch.tensor([5, 0]), ValueError, "cut must lie in 0..4, got 5 at index 0"),
    ("cut", torch.tensor([0, -1]), ValueError, "cut must lie in 0..6, got -1 at index 1"),
    ("cut", torch.tensor([1]), ValueError, "cut must be as long as rows, got 1 and 2"),
    ("max_len", -1, ValueError, "max_len must be at least 0, got -1"),
    ("max_len", 2.5, TypeError, "max_len must be an int, got float"),
    ("impl", "quick", ValueError, "impl must be one of"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_named(name, value, error, message, impl):
    right = {"values": torch.arange(10), "offsets": to_offsets([4, 6]), "rows": torch.tensor([0, 1]), "max_len": 3}
    with pytest.raises(error, match=message):
        ops.gather_histories(**{**right, "impl": impl, name: value})


@pytest.mark.parametrize("impl", IMPLS)
def test_max_len_may_be_any_size(impl):
    packed, offsets = ops.gather_histories(np.arange(5), np.array([0, 2, 5]), np.array([1, 0]), 2**70, impl=impl)
    assert packed.tolist() == [2, 3, 4, 0, 1]
    assert offsets.tolist() == [0, 3, 5]


def test_views_that_are_not_what_lies_in_memory():
    values, offsets, rows = torch._neg_view(torch.arange(3)), torch.tensor([0, 3]), torch.tensor([0])
    for impl in ("auto", "reference"):
        assert ops.gather_histories(values, offsets, rows, 9, impl=impl)[0].tolist() == [0, -1, -2]


@pytest.mark.needs_ext
def test_a_tensor_without_memory_of_its_own_is_refused():
    offsets, rows = torch.tensor([0, 3]), torch.tensor([0])
    with pytest.raises(TypeError, match="values must be a tensor with memory of its own"):
        torch.func.functionalize(lambda values: ops.gather_histories(values, offsets, rows, 9)[0])(torch.arange(3))
