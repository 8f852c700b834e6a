"""A UserState that has taken events bit by bit reads like a full pass over them, on every backbone that allows it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_cases import KINDS, SPECS, V, add, histories, make_model, pack

from pcl_ext import store
from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone, BackboneConfig, UserState
from pcl_ext.task import TaskSpec

LENGTHS = [[5, 0, 1, 12, 3, 0], [1, 2, 0, 3, 1, 0], [4, 1, 0, 0, 9, 0]]  # rounds of events of six users


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(**KINDS[request.param])


def rounds(lengths=LENGTHS):
    return [histories(row, seed) for seed, row in enumerate(lengths)]


def grown(model, events, **options):
    """A state that took the events round by round."""
    state = model.user_state(pack(events[0]), **options)
    for new in events[1:]:
        state.extend(pack(new))
    return state


def joined(events):
    return [sum(parts, []) for parts in zip(*events)]


@pytest.mark.parametrize("readout", [("last",), ("last", "mean", "item_memory")], ids=str)
@pytest.mark.parametrize("length", [0, 3, 25])
def test_equals_a_full_pass(model, length, readout):
    events = rounds()
    for name in SPECS:
        add(model, name, "tail", length, readout=readout)
    add_plain(model, readout)
    state, batch = grown(model, events), pack(joined(events))
    assert torch.equal(state.batch().items, batch.items)
    assert torch.equal(state.batch().offsets, batch.offsets)
    together = model.encode(state)
    for name in model.task_names:
        torch.testing.assert_close(together[name], model.encode(batch, [name])[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(state, name), model(batch, name), rtol=1e-4, atol=1e-5)


def add_plain(model, readout):
    add(model, TaskSpec("plain", "binary"), "none", readout=readout)


@pytest.mark.parametrize("placement", ["tail", "prefix", "both", "layers"])
def test_a_prompt_of_no_rows_is_none(model, placement):
    task, events = add(model, "click", placement, 0), rounds()
    assert (task.tail(), task.prefix(), task.layer_prefix(model.backbone)) == (None, None, None)
    got, want = model(grown(model, events), "click"), model(pack(joined(events)), "click")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_votes_of_a_history_need_all_states(model):
    task = model.add_task(TaskSpec("again", "items", repeats=True))
    torch.nn.init.normal_(task.repeats.vote.weight)
    torch.nn.init.normal_(task.tail())
    events = rounds()
    torch.testing.assert_close(model(grown(model, events), "again"), model(pack(joined(events)), "again"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [None, 1, 8])
def test_a_full_window_starts_again_from_its_newest_events(kind, keep):
    model = make_model(max_len=8, **KINDS[kind])
    add(model, "click", "tail", 3, readout=("last", "mean"))
    state, held = UserState(model.backbone, 6, every_state=True, keep=keep), [[] for _ in range(6)]
    for new in rounds([*LENGTHS, [0, 0, 0, 30, 2, 1], [1] * 6]):
        held = [old + more for old, more in zip(held, new)]
        state.extend(PackedBatch.from_lists(new, num_items=V, max_len=100))
        held = [ids if len(ids) <= 8 else ids[-(keep or 6) :] for ids in held]
        batch = PackedBatch.from_lists(held, num_items=V, max_len=8)
        assert torch.equal(state.batch().items, batch.items)
        torch.testing.assert_close(model(state, "click"), model(batch, "click"))


def test_a_pass_that_fails_takes_nothing_away(model, monkeypatch):
    add(model, "click", "tail", 3, readout=("last", "mean"))
    most = model.backbone.config.max_len
    state, run = model.user_state(pack(histories([most, 5, 0]))), model.backbone.run
    want, new = model(state, "click"), pack(histories([2, 1, 3], seed=1))

    def fail(*args, **kwargs):
        run(*args, **kwargs)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "run", fail)
        with pytest.raises(MemoryError):
            state.extend(new)
    assert torch.equal(model(state, "click"), want)
    state.extend(new)
    again = model.user_state(pack(histories([most, 5, 0])))
    again.extend(new)
    assert torch.equal(model(state, "click"), model(again, "click"))


def test_threads_read_a_state_at_once(model):
    add(model, "click", "tail", 3, readout=("last", "mean"))
    state = grown(model, rounds())

    def read(_=None):
        with torch.no_grad():
            return model(state, "click")

    want = read()
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(got, want) for got in pool.map(read, range(32)))


@pytest.mark.parametrize("kind", KINDS)
def test_users_who_run_out_of_room_one_after_the_other_are_moved_together(kind, monkeypatch):
    """Sixty users with histories of 1 to 20, one event a round: three more need rows in every round."""
    model, moves, move = make_model(max_len=100, **KINDS[kind]), [], UserState._move
    rows = [[1 + user % 20 for user in range(60)], *[[1] * 60] * 40]
    monkeypatch.setattr(UserState, "_move", lambda self, *args: (moves.append(len(self.items)), move(self, *args)))
    state, held = UserState(model.backbone, 60), [[] for _ in range(60)]
    for new in rounds(rows):
        held = [old + more for old, more in zip(held, new)]
        state.extend(PackedBatch.from_lists(new, num_items=V, max_len=100))
    assert len(moves) <= 3
    assert torch.equal(state.batch().items, PackedBatch.from_lists(held, num_items=V, max_len=100).items)


@pytest.mark.parametrize("every_state", [False, True])
def test_users_without_new_events_are_left_out_of_the_pass(model, monkeypatch, every_state):
    state = UserState.of(model.backbone, pack(rounds()[0]), every_state=every_state)
    passes, run = [], Backbone.run

    def counted(self, x, offsets, **more):
        passes.append(offsets.tolist())
        return run(self, x, offsets, **more)

    monkeypatch.setattr(Backbone, "run", counted)
    before = [tensor.clone() for tensor in state.tensors().values()]
    state.extend(pack([[]] * 6))
    assert all(map(torch.equal, before, state.tensors().values()))
    state.extend(pack([[], [], [1, 2], [], [3], []]))
    assert passes == [[0], [0, 2, 3]]


def test_there_and_back_and_some_users(model, tmp_path):
    add(model, "click", "tail", 3)
    state = grown(model, rounds(), keep=7)
    store.save_tensors(tmp_path / "state.safetensors", state.tensors(), {})
    loaded = UserState.from_tensors(model.backbone, store.load_tensors(tmp_path / "state.safetensors")[0])
    assert torch.equal(model(loaded, "click"), model(state, "click"))
    users = torch.tensor([3, 0, 5])
    some = state.select(users)
    assert state.keep == loaded.keep == some.keep == 7
    torch.testing.assert_close(model(some, "click"), model(state, "click")[users])
    some.extend(pack([[1, 2], [], [3]]))
    loaded.extend(pack([[], [], [], [1, 2], [], [3]]))
    torch.testing.assert_close(model(some, "click"), model(loaded, "click")[users])
    torch.testing.assert_close(model(state, "click"), model(state.batch(), "click"))  # untouched


def test_mistakes_are_named(model):
    state = model.user_state(pack(histories()))
    add(model, "click", "prefix")
    add(model, "age", "tail", readout=("mean",))
    with pytest.raises(ValueError, match="'click' has a prefix"):
        model(state, "click")
    with pytest.raises(ValueError, match="'age' reads the states of all rows"):
        model(state, "age")
    with pytest.raises(ValueError, match="each of 6 users, got 1"):
        state.extend(pack([[1]]))
    with pytest.raises(TypeError, match=r"batch must be a PackedBatch, say of PackedBatch.from_lists, got list"):
        state.extend([[1]] * 6)
    tensors = state.tensors()
    model.backbone.table.add_(1)
    with pytest.raises(ValueError, match="another backbone"):
        UserState.from_tensors(model.backbone, tensors)
    with pytest.raises(ValueError, match="must hold 'backbone'"):
        UserState.from_tensors(model.backbone, {})
    with pytest.raises(ValueError, match="learned_from_end"):
        UserState(Backbone(BackboneConfig(V)), 1)
    with pytest.raises(ValueError, match="frozen backbone"):
        UserState(Backbone(BackboneConfig(V, positions="rotary")), 1)
