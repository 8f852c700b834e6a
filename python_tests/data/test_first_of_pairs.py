"""The first row of each pair, some rows at a time."""

import numpy as np
import pytest

from pcl_ext.data import log


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_it_is_the_first_row_of_each_pair_whatever_is_sorted_at_a_time(rows, monkeypatch):
    monkeypatch.setattr(log, "_ROWS", rows)
    rng = np.random.default_rng(0)
    user, item = np.sort(rng.integers(0, 20, 300)), rng.integers(0, 9, 300)
    seen, expected = set(), []
    for row, pair in enumerate(zip(user.tolist(), item.tolist())):
        if pair not in seen:
            seen.add(pair)
            expected.append(row)
    assert np.flatnonzero(log.first_of_pairs(user, item, 9)).tolist() == expected
    assert 0 < len(expected) < 300


def test_of_nothing_there_is_none():
    nothing = np.empty(0, np.int64)
    assert log.first_of_pairs(nothing, nothing, 5).tolist() == []
