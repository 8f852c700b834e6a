"""The best items of each user: what is best, and which of equals."""

import torch

from pcl_ext.model.top_items import TopItems


def test_zero_and_minus_zero_are_equal_and_go_by_the_lowest_id():
    for scores in ([0.0, -0.0, 1.0], [-0.0, 0.0, 1.0]):
        for items in ([5, 3, 9], [3, 5, 9]):
            best = TopItems(1, 2)
            best.offer(torch.tensor([scores]), torch.tensor(items))
            assert best.items.tolist() == [[9, 3]]
