"""PackedBatch from plain lists: what is kept, what is dropped, what is refused."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data._utils import pin_memory as torch_pin

from pcl_ext import PackedBatch
from pcl_ext.data import ExampleBatch


def test_the_newest_known_ids_are_kept():
    batch = PackedBatch.from_lists([[1, 9, 2, 0, 3], [], [-1], (4, 5)], num_items=5, max_len=2)
    assert batch.items.tolist() == [2, 3, 4, 5]
    assert batch.offsets.tolist() == [0, 2, 2, 2, 4]
    assert (len(batch), batch.max_seqlen, batch.dropped) == (4, 2, 3)
    assert batch.lengths.tolist() == [2, 0, 0, 2]
    assert batch.users.tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("max_len", [0, -1])
def test_a_history_has_room_for_an_event(max_len):
    with pytest.raises(ValueError, match=f"max_len must be at least 1, got {max_len}"):
        PackedBatch.from_lists([[1]], num_items=5, max_len=max_len)


def test_what_is_older_comes_along():
    batch = PackedBatch.from_lists([[4, 1, 9, 2, 3], [5], [3, 2, 1]], num_items=5, max_len=2)
    for part in (batch, pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert part.items.tolist() == [2, 3, 5, 2, 1]
        assert part.older.items.tolist() == [4, 1, 3]
        assert part.older.offsets.tolist() == [0, 2, 2, 3]
        assert part.older.on_host.tolist() == [2, 0, 1]
    assert batch.to("meta").older.items.is_meta
    assert PackedBatch.from_lists([[1, 2], [9, 3, 4]], num_items=5, max_len=2).older is None


def test_a_loader_pins_every_tensor(monkeypatch):
    """Without a GPU torch pins nothing: what is asked of it is looked at."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = PackedBatch.from_lists([[4, 1, 9, 2, 3], [5], [3, 2, 1]], num_items=5, max_len=2)
    other = ExampleBatch(batch, torch.ones(3), torch.arange(3), torch.arange(3))
    moved = torch_pin.pin_memory(other)
    asked = {id(x) for x in pinned}
    for part in (batch, batch.older, batch.plan, other):
        values = part._asdict() if isinstance(part, tuple) else vars(part)
        named = {name for name, x in values.items() if isinstance(x, torch.Tensor) and id(x) in asked}
        assert named == {name for name, x in values.items() if isinstance(x, torch.Tensor)} - {"on_host", "work"}
    assert moved.history.items.tolist() == batch.items.tolist()
    assert moved.history.older.items.tolist() == batch.older.items.tolist()
    assert moved.history.plan.total == batch.plan.total


@pytest.mark.parametrize("max_len", [1, 2, 3, 4])
def test_stored_histories_are_read_as_lists_are(max_len):
    lists = [[4, 1, 2, 3], [5], [], [3, 2, 1]]
    values, offsets = np.concatenate(lists).astype(np.int32), np.array([0, 4, 5, 5, 8])
    rows, cut = torch.tensor([3, 0, 1, 2, 0]), torch.tensor([3, 4, 1, 0, 2])
    got = PackedBatch.from_stored(values, offsets, rows, cut, max_len)
    want = PackedBatch.from_lists([lists[r][:c] for r, c in zip(rows, cut)], num_items=5, max_len=max_len)
    assert (got.older is None) == (want.older is None) == (max_len == 4)
    for one, other in ((got, want), (got.older, want.older)):
        if one is not None:
            assert one.items.tolist() == other.items.tolist()
            assert torch.equal(one.offsets, other.offsets)
            assert torch.equal(one.on_host, other.on_host)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_padding_is_left_out_on_either_side(dtype):
    padded = torch.tensor([[3, 1, 2, 0], [0, 0, 5, 4], [0, 0, 0, 0], [1, 2, 3, 4]], dtype=dtype)
    got = PackedBatch.from_padded(padded)
    want = PackedBatch.from_lists([[3, 1, 2], [5, 4], [], [1, 2, 3, 4]], num_items=5, max_len=4)
    assert got.items.dtype == dtype
    assert got.items.tolist() == want.items.tolist()
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.on_host, want.on_host)
    assert (got.max_seqlen, len(PackedBatch.from_padded(padded[:0]))) == (4, 0)


@pytest.mark.parametrize(
    ("padded", "message"),
    [
        (torch.tensor([1, 2]), r"padded must be \[B, L\] int32 or int64, got \[2\] torch.int64"),
        (torch.ones(2, 3), r"padded must be \[B, L\] int32 or int64, got \[2, 3\] torch.float32"),
        (torch.tensor([[1, 0], [-100, 2]]), "items must be ids from 1 up, got -100 in row 1"),
    ],
)
def test_what_is_no_padded_block_is_named(padded, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_padded(padded)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedBatch.from_padded(np.ones((2, 3), np.int64)), "padded must be a Tensor, got ndarray"),
        (lambda: PackedBatch.from_padded([[1, 2]]), "padded must be a Tensor, got list"),
        (lambda: PackedBatch.from_packed([1, 2], torch.tensor([0, 2])), "items must be a Tensor, got list"),
        (lambda: PackedBatch.from_packed(torch.tensor([1]), np.array([0, 1])), "offsets must be a Tensor, got ndarray"),
        *(
            (
                lambda x=x: PackedBatch.from_lists(x, num_items=5, max_len=2),
                "histories must be a list of lists of item ids",
            )
            for x in (None, 3, "12", {1: [2]})
        ),
        (lambda: PackedBatch.from_lists([[1]], num_items=5, max_len=2.0), "max_len must be an int, got float"),
        (lambda: PackedBatch.from_lists([[1]], num_items=None, max_len=2), "num_items must be an int, got NoneType"),
    ],
)
def test_arguments_of_another_type_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_no_history_at_all():
    batch = PackedBatch.from_lists([], num_items=5, max_len=2)
    assert (len(batch), batch.max_seqlen, batch.items.numel()) == (0, 0, 0)


def read_only(ids):
    ids.flags.writeable = False
    return ids


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "history",
    [
        np.array([4, 1, 3])[::-1],
        np.array([3, 9, 1, 9, 4])[::2],
        np.array([3, 1, 4], ">i8"),
        np.array([3, 1, 4], ">u2"),
        np.array([3, 1, 4], np.uint64),
        read_only(np.array([3, 1, 4])),
        np.array([[3, 1], [1, 3], [4, 0]], np.int32)[:, 0],
        torch.tensor([3, 1, 4], dtype=torch.int16),
    ],
    ids=["backwards", "in steps", "big-endian", "big-endian uint16", "uint64", "read-only", "a column", "a tensor"],
)
def test_any_integer_array_is_a_history(history):
    assert PackedBatch.from_lists([history], num_items=5, max_len=3).items.tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (3, "history 1 must be a list of item ids, got 3"),
        (None, "history 1 must be a list of item ids, got None"),
        (["tea"], r"history 1 must be a list of item ids, got \['tea'\]"),
        ([2**70], "history 1 must be a list of item ids"),
        ([1.5], r"history 1 must be a flat list of integer item ids, got \[1.5\]"),
        ([1, True], r"history 1 must be a flat list of integer item ids, got \[1, True\]"),
        ([[1, 2]], "history 1 must be a flat list"),
        ([True], "history 1 must be a flat list"),
        (np.array([1.5]), "history 1 must be a flat list"),
        (np.array([[1, 2]]), "history 1 must be a flat list"),
        (np.array(3), "history 1 must be a list of item ids, got 3"),
    ],
    ids=str,
)
def test_what_is_no_history_is_named(history, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_lists([[1], history], num_items=5, max_len=2)


@pytest.mark.parametrize(
    ("items", "offsets", "message"),
    [
        (torch.ones(3), torch.tensor([0, 3]), "items must be"),
        (torch.ones(3, 1, dtype=torch.int64), torch.tensor([0, 3]), "items must be"),
        (torch.ones(3, dtype=torch.int64), torch.tensor([0, 2]), "must end at the number of items, got 2 and 3"),
        (torch.ones(3, dtype=torch.int64), torch.tensor([1, 3]), "offsets"),
        (torch.ones(3, dtype=torch.int64), torch.tensor([0, 4, 3]), "offsets"),
    ],
    ids=["float", "two dimensions", "short", "start", "decrease"],
)
def test_offsets_must_fit_the_items(items, offsets, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_packed(items, offsets)


@pytest.mark.parametrize(("ids", "message"), [([3, 0, 4], "got 0 in row 1"), ([3, 4, -7], "got -7 in row 2")], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_items_that_are_no_ids_are_refused(ids, message, dtype):
    with pytest.raises(ValueError, match=f"items must be ids from 1 up, {message}"):
        PackedBatch.from_packed(torch.tensor(ids, dtype=dtype), torch.tensor([0, 3]))


@pytest.mark.parametrize("max_len", [2, 9], ids=["with older", "whole"])
def test_a_batch_moves_as_trainers_move_tensors(max_len):
    batch = PackedBatch.from_lists([[3, 1, 2], [], [5]], num_items=9, max_len=max_len)
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert torch.equal(moved.items, batch.items)
    assert moved.plan.offsets is batch.offsets
    assert (moved.older is None) == (max_len == 9)


def test_batches_are_compared_as_objects():
    one, other = (PackedBatch.from_lists([[1, 2, 3], [4]], num_items=5, max_len=2) for _ in range(2))
    assert one in [other, one]
    assert one != other
    assert one.older != other.older
    assert len({one, other, one}) == 2


def test_another_default_device_is_no_matter():
    values, offsets, rows = np.arange(1, 8), np.array([0, 3, 7]), np.array([1])
    with torch.device("meta"):
        batch = PackedBatch.from_stored(values, offsets, rows, np.array([4]), 2)
        lists = PackedBatch.from_lists([(4, 5, 6, 7), [], [2], np.array([3])], num_items=9, max_len=2)
    assert batch.items.tolist() == [6, 7]
    assert batch.older.items.tolist() == [4, 5]
    assert lists.whole[0].tolist() == [4, 5, 6, 7, 2, 3]
    assert lists.older.on_host.tolist() == [2, 0, 0, 0]


def test_lists_and_arrays_of_the_same_ids_are_the_same_batch():
    lists = [[9, 1, 2, 3], [], [4, 99, 5], [7], [-1, 0], [1, 2, 3, 4, 5, 6]]
    batches = [
        PackedBatch.from_lists(histories, num_items=9, max_len=3)
        for histories in (lists, [np.array(h, np.int32) for h in lists], (tuple(h) for h in lists))
    ]
    for batch in batches:
        assert batch.items.tolist() == [1, 2, 3, 4, 5, 7, 4, 5, 6]
        assert batch.offsets.tolist() == [0, 3, 3, 5, 6, 6, 9]
        assert batch.dropped == 3
        assert batch.older.items.tolist() == [9, 1, 2, 3]
        assert batch.older.on_host.tolist() == [1, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("wrong", [True, 1.0, 2**70, "3"], ids=str)
def test_the_history_with_a_wrong_id_is_named(wrong):
    with pytest.raises(ValueError, match="history 1 must be a"):
        PackedBatch.from_lists([[1, 2], [wrong], [4]], num_items=5, max_len=2)
