"""The best items of each user: what is best, and which of equals."""

import pytest
import torch

from pcl_ext.model.top_items import TopItems


def test_zero_and_minus_zero_are_equal_and_go_by_the_lowest_id():
    for scores in ([0.0, -0.0, 1.0], [-0.0, 0.0, 1.0]):
        for items in ([5, 3, 9], [3, 5, 9]):
            best = TopItems(1, 2)
            best.offer(torch.tensor([scores]), torch.tensor(items))
            assert best.items.tolist() == [[9, 3]]


def test_block_by_block_it_is_the_best_of_all():
    """Blocks that hold nothing for some users, for none, or equals of what is kept already."""
    torch.manual_seed(0)
    scores = torch.randn(6, 400).mul(3).round()
    scores[:, 100:200] -= 50
    scores[2, 300:] = torch.inf
    items, best = torch.randperm(400) + 1, TopItems(6, 5)
    for part in torch.arange(400).split(20):
        best.offer(scores[:, part], items[part])
    for user in range(6):
        order = sorted(range(400), key=lambda place: (-scores[user, place].item(), items[place].item()))[:5]
        assert best.items[user].tolist() == items[order].tolist()
        assert best.scores[user].tolist() == scores[user, order].tolist()


def test_a_damaged_score_is_found_in_any_block():
    best, scores = TopItems(2, 1), torch.zeros(2, 3)
    best.offer(scores + 9, torch.tensor([1, 2, 3]))
    scores[1, 1] = torch.nan
    with pytest.raises(FloatingPointError, match="a score is NaN"):
        best.offer(scores, torch.tensor([4, 5, 6]))
