"""attention_plan: the same work list from the compiled module and the twin, every history in it once."""

import sys

import pytest
import torch
from attention_cases import CASES, to_offsets
from hypothesis import given, settings
from hypothesis import strategies as st

from pcl_ext import ops
from pcl_ext.ops import _gpu, reference
from pcl_ext.ops.attention_plan import cuda_list


def read(plan):
    """The parts of a work list by name (csrc/attention_plan.h)."""
    b, r = plan.batch, plan.num_prefixes
    sizes = {"offsets": b + 1, "prefix_offsets": r + 1, "prefix_index": b, "members": b}
    sizes |= {"chunk_begin": b + 1, "chunk_order": b, "prefix_chunk": r + 1, "num_chunks": 1}
    return dict(zip(sizes, plan.work.split(list(sizes.values()))))


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 400), max_size=12))
    prefixes = draw(st.lists(st.integers(0, 30), max_size=4))
    index = draw(st.lists(st.integers(-1, len(prefixes) - 1), min_size=len(lengths), max_size=len(lengths)))
    return to_offsets(lengths), to_offsets(prefixes), torch.tensor(index, dtype=torch.int64)


@pytest.mark.needs_ext
@settings(max_examples=100, deadline=None)
@given(batches())
def test_equals_the_twin(batch):
    plan = ops.attention_plan(*batch)
    assert torch.equal(plan.work, reference.attention_plan(*batch))


@settings(max_examples=50, deadline=None)
@given(batches())
def test_every_history_is_in_one_chunk_of_its_prefix(batch):
    plan = ops.attention_plan(*batch)
    parts = read(plan)
    chunks = int(parts["num_chunks"])
    assert sorted(parts["members"].tolist()) == list(range(plan.batch))
    assert sorted(parts["chunk_order"].tolist()) == list(range(plan.batch))
    begins = parts["chunk_begin"].tolist()
    for c in range(chunks):
        members = parts["members"][begins[c] : begins[c + 1]]
        prefixes = set(batch[2][members].tolist())
        assert len(prefixes) == 1
        r = prefixes.pop()
        if r >= 0:
            assert parts["prefix_chunk"][r] <= c < parts["prefix_chunk"][r + 1]


@pytest.mark.parametrize("name", CASES)
def test_counts(name):
    lengths, prefixes, index = CASES[name]
    plan = ops.attention_plan(
        to_offsets(lengths),
        None if prefixes is None else to_offsets(prefixes),
        None if index is None else torch.tensor(index),
    )
    assert (plan.batch, plan.total) == (len(lengths), sum(lengths))
    assert (plan.num_prefixes, plan.prefix_total) == (len(prefixes or []), sum(prefixes or []))
    assert plan.prefix_index is None if prefixes is None else plan.prefix_index.shape == (len(lengths),)


def test_large_batches_have_few_chunks():
    offsets = torch.arange(0, 800_001, 20)
    index = torch.arange(40_000) % 2
    prefix_offsets = torch.tensor([0, 3, 5])
    plan = ops.attention_plan(offsets, prefix_offsets, index)
    assert torch.equal(plan.work, reference.attention_plan(offsets, prefix_offsets, index))
    assert 1000 < int(plan.work[-1]) <= 1026


def test_left_out_index():
    one, own = ops.attention_plan(to_offsets([1, 2]), to_offsets([3])), ops.attention_plan(*[to_offsets([1, 2])] * 2)
    assert one.prefix_index.tolist() == [0, 0]
    assert own.prefix_index.tolist() == [0, 1]


def test_moves():
    plan = ops.attention_plan(to_offsets([1, 2]), to_offsets([3]))
    assert plan.to("cpu") is plan
    assert plan.to("meta").work.device.type == "meta"


def test_made_on_cuda_it_is_unread_until_it_comes_to_the_cpu(monkeypatch):
    layout = (to_offsets([4, 0, 2]), to_offsets([3, 1]), torch.tensor([0, 1, -1]))
    want = ops.attention_plan(*layout)
    with monkeypatch.context() as patch:
        patch.setattr(_gpu, "_emulator", object())
        plan, wrong = ops.attention_plan(*layout), ops.attention_plan(torch.tensor([0, 4, 2]))
    assert (plan.total, plan.prefix_total) == (None, None)
    parts = [torch.tensor(part) for part in ([0, 4, 4, 6, 0, 3, 4, 0, 1, -1], [2, 0, 1], [1, 2, 2], [1, 2, 3])]
    assert torch.equal(plan.work, torch.cat(parts))
    rows = torch.randn(6, 1, 16)
    with pytest.raises(ValueError, match="offsets must end at len"):
        ops.prompt_attention(rows, rows, rows, plan.offsets, rows[:4], rows[:4], *layout[1:], plan=plan)
    assert torch.equal(plan.to("cpu").work, want.work)
    with pytest.raises(ValueError, match="never decrease"):
        wrong.to("cpu")


def test_made_on_the_cpu_it_takes_to_cuda_what_is_read_there(monkeypatch):
    layout = (to_offsets([4, 0, 2]), to_offsets([3, 1]), torch.tensor([0, 1, -1]))
    monkeypatch.setattr(sys.modules["pcl_ext.ops.attention_plan"], "runs_cuda", lambda tensor: tensor.is_meta)
    plan = ops.attention_plan(*layout).to("meta")
    assert (plan.total, plan.prefix_total) == (6, 4)
    assert len(plan.work) == len(cuda_list(*layout)) == 19


@pytest.mark.needs_ext
def test_opcheck():
    args = (to_offsets([5, 0, 300]), to_offsets([2, 3]), torch.tensor([1, -1, 0]), 305, 5)
    torch.library.opcheck(torch.ops.pcl_ext.attention_plan.default, args)
