"""Columns of ids as codes: the same ids, however many pieces they come in."""

import numpy as np
import pyarrow as pa
import pytest

from pcl_ext.data import coded


@pytest.mark.parametrize("waiting", [0, 3, 100])
def test_pieces_become_one_column_with_ids_in_the_order_of_their_first_rows(waiting, monkeypatch):
    monkeypatch.setattr(coded, "_IDS", waiting)
    pieces = [["b", "a", "b"], [], ["c", None, "a"], ["d", "e"], ["e", "b"]]
    column = coded.coded(pa.chunked_array(pieces, pa.string()))
    assert column.to_pylist() == sum(pieces, [])
    assert column.num_chunks == 1
    assert column.chunk(0).dictionary.to_pylist() == ["b", "a", "c", "d", "e"]


def test_ids_of_no_row_are_not_in_the_dictionary():
    chunks = [pa.DictionaryArray.from_arrays(pa.array([2, None, 2]), pa.array(["a", "b", "c"])) for _ in range(2)]
    column = coded.coded(pa.chunked_array(chunks))
    assert column.to_pylist() == ["c", None, "c"] * 2
    assert column.chunk(0).dictionary.to_pylist() == ["c"]


def test_ids_that_become_the_same_share_a_code_and_null_ones_are_null_rows():
    column = coded.coded(pa.chunked_array([["1", "", "01", "1"]]))
    changed = coded.with_ids(column, lambda ids: pa.array([1, None, 1]))
    assert changed.to_pylist() == [1, None, 1, 1]
    assert changed.null_count == 1
    assert changed.chunk(0).dictionary.to_pylist() == [1]


def test_some_rows_at_a_time_are_all_rows(monkeypatch):
    monkeypatch.setattr(coded, "_ROWS", 3)
    rows = np.random.default_rng(0).integers(0, 5, 20).astype(np.int32)
    assert coded.gather(np.arange(5) * 10, rows).tolist() == (rows * 10).tolist()
    assert coded.count_codes(rows, 5).tolist() == np.bincount(rows, minlength=5).tolist()
