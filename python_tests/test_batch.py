"""PackedBatch from plain lists: what is kept, what is dropped, what is refused."""

import pytest
import torch

from pcl_ext import PackedBatch


def test_the_newest_known_ids_are_kept():
    batch = PackedBatch.from_lists([[1, 9, 2, 0, 3], [], [-1], (4, 5)], num_items=5, max_len=2)
    assert batch.items.tolist() == [2, 3, 4, 5]
    assert batch.offsets.tolist() == [0, 2, 2, 2, 4]
    assert (len(batch), batch.max_seqlen, batch.dropped) == (4, 2, 3)
    assert batch.lengths.tolist() == [2, 0, 0, 2]
    assert batch.users.tolist() == [0, 0, 3, 3]


def test_no_history_at_all():
    batch = PackedBatch.from_lists([], num_items=5, max_len=2)
    assert (len(batch), batch.max_seqlen, batch.items.numel()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (3, "history 1 must be a list of item ids, got 3"),
        (None, "history 1 must be a list of item ids, got None"),
        (["tea"], r"history 1 must be a list of item ids, got \['tea'\]"),
        ([2**70], "history 1 must be a list of item ids"),
        ([1.5], r"history 1 must be a flat list of integer item ids, got \[1.5\]"),
        ([[1, 2]], "history 1 must be a flat list"),
        ([True], "history 1 must be a flat list"),
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
