"""An item memory reads all events of a history, also those before the newest max_len that the backbone reads."""

from dataclasses import replace

import pytest
import torch
from model_cases import V, add, histories, make_model

from pcl_ext.batch import PackedBatch
from pcl_ext.model import UserState
from pcl_ext.task import TaskSpec

MOST = 8
LENGTHS = [20, 3, 0, 9, 8, 31]
READOUT = ("last", "mean", "item_memory")


def long_batch(lengths=LENGTHS, seed=0, window=MOST):
    return PackedBatch.from_lists(histories(lengths, seed), num_items=V, max_len=window)


def click(model, name="click", **settings):
    return add(model, TaskSpec(name, "classes", num_classes=3), settings.pop("placement", "none"), 3, **settings)


def test_a_batch_gives_what_is_older_and_what_is_read_in_one():
    given = histories(LENGTHS)
    items, offsets = PackedBatch.from_lists(given, num_items=V, max_len=MOST).whole
    assert [part.tolist() for part in items.split(offsets.diff().tolist())] == given
    short = PackedBatch.from_lists([[1], [], [2, 3]], num_items=V, max_len=MOST)
    assert short.older is None
    assert short.whole == (short.items, short.offsets)


@pytest.mark.parametrize("rows", [16_384, 7], ids=["a row an item", "hashed"])
@pytest.mark.parametrize("whole", [True, False])
def test_item_memory_sums_what_it_says(rows, whole):
    model = make_model(max_len=MOST)
    memory = click(model, readout=("item_memory",), item_rows=rows, whole_history=whole).memories["item_memory"]
    table, want = memory.item_table().double(), []
    for history in histories(LENGTHS):
        read = history if whole else history[-MOST:]
        want.append(table[read].sum(0) / max(1, len(read)) ** 0.5)
    got = model.encode(long_batch())["click"]
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-6, atol=1e-6)


def test_the_window_alone_is_read_as_before():
    model, batch = make_model(max_len=MOST), long_batch()
    click(model, readout=READOUT, whole_history=False)
    assert torch.equal(model(batch, "click"), model(replace(batch, older=None), "click"))
    click(model, "whole", readout=READOUT)
    same = model(batch, "whole") == model(replace(batch, older=None), "whole")
    assert same.all(1).tolist() == [n <= MOST for n in LENGTHS]


@pytest.mark.parametrize("placement", ["none", "tail", "prefix", "both", "layers"])
def test_every_way_of_reading_agrees(placement):
    model, batch = make_model(max_len=MOST), long_batch()
    for name, readout in (("a", READOUT), ("b", ("last", "item_memory")), ("c", ("item_memory",))):
        click(model, name, placement=placement, readout=readout)
    alone = {name: model(batch, name) for name in model.task_names}
    index = torch.tensor([0, 1, 2, 0, 1, 2])
    for name, (rows, mixed) in model(batch, task_index=index).items():
        torch.testing.assert_close(mixed, alone[name][rows], rtol=1e-4, atol=1e-5)
    together = model.encode(batch)
    for name in model.task_names:
        torch.testing.assert_close(together[name], model.encode(batch, [name])[name], rtol=1e-4, atol=1e-5)


def test_closing_changes_nothing():
    model, batch = make_model(max_len=MOST), long_batch()
    click(model, readout=READOUT, members=2)
    before = model(batch, "click")
    model.freeze_task("click")
    torch.testing.assert_close(model(batch, "click"), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [MOST, 3])
@pytest.mark.parametrize("placement", ["none", "tail"])
def test_a_user_state_holds_what_lies_before_its_window(placement, window):
    model = make_model(max_len=MOST, positions="rotary")
    click(model, placement=placement, readout=READOUT)
    rounds = [LENGTHS, [0, 4, 1, 2, 3, 0], [12, 0, 0, 1, 0, 0], [1, 1, 1, 9, 20, 2], [3, 3, 8, 0, 0, 5]]
    state, held = UserState(model.backbone, len(LENGTHS), every_state=True), [[] for _ in LENGTHS]
    for seed, lengths in enumerate(rounds):
        new = histories(lengths, seed)
        held = [old + more for old, more in zip(held, new)]
        state.extend(long_batch(lengths, seed, window))
        items, offsets = state.batch().whole
        assert [part.tolist() for part in items.split(offsets.diff().tolist())] == held
        torch.testing.assert_close(model(state, "click"), model(state.batch(), "click"), rtol=1e-4, atol=1e-5)
    again = UserState.from_tensors(model.backbone, state.tensors())
    assert torch.equal(model(again, "click"), model(state, "click"))
    some = torch.tensor([5, 0, 0])
    torch.testing.assert_close(model(state.select(some), "click"), model(state, "click")[some])


def test_an_older_id_that_is_none_is_refused_by_a_user_state():
    model = make_model(max_len=MOST, positions="rotary")
    state = UserState(model.backbone, 1)
    with pytest.raises(ValueError, match=f"items must be in 1..{V}, got 1..{V + 1}"):
        state.extend(PackedBatch.from_lists([[V + 1] + [1] * MOST], num_items=V + 1, max_len=MOST))
    assert len(state.batch().items) == 0


def test_a_batch_that_is_refused_leaves_what_is_older(monkeypatch):
    model = make_model(max_len=MOST, positions="rotary")
    click(model, readout=READOUT)
    state = model.user_state(long_batch())
    want = [part.clone() for part in state.batch().whole]

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(model.backbone, "run", fail)
    with pytest.raises(MemoryError):
        state.extend(long_batch(seed=1))
    assert all(torch.equal(got, part) for got, part in zip(state.batch().whole, want))
