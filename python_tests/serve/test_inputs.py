"""Every form in which histories may come gives the same ids and offsets; what is none says where it is wrong."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import make_model

from pcl_ext import Predictor, save_pretrained
from pcl_ext.serve import ItemIds, read_histories
from pcl_ext.serve.inputs import Histories

LISTS = [[3, 1, 2], [], [7], [5, 5]]
EVEN = [[1, 2], [3, 4]]


def column(kind=None, lists=LISTS, wrap=pa.list_):
    return pa.array(lists, wrap(kind or pa.int64()))


FORMS = {
    "lists": LISTS,
    "tuple of arrays": tuple(np.array(x, np.int32) for x in LISTS),
    "dict of lists": {"items": LISTS, "user_id": [1, 2, 3, 4]},
    "dict of objects": {"items": np.array([np.array(x, np.int16) for x in LISTS], dtype=object)},
    "packed": {"values": np.array(sum(LISTS, []), np.uint64), "offsets": np.array([0, 3, 3, 4, 6], np.int32)},
    "arrow array": column(),
    "arrow large list": column(pa.int32(), wrap=pa.large_list),
    "chunks": pa.chunked_array([column(lists=LISTS[:1]), column(lists=LISTS[1:])]),
    "table": pa.table({"user_id": [1, 2, 3, 4], "items": column(pa.uint16())}),
    "record batch": pa.RecordBatch.from_pydict({"items": column()}),
    "sliced": pa.table({"items": pa.array([[9, 9], *LISTS, [8]], pa.list_(pa.int64()))}).slice(1, 4),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_every_form(data):
    got = read_histories(data)
    assert got.items.tolist() == sum(LISTS, [])
    assert got.offsets.tolist() == [0, 3, 3, 4, 6]
    assert got.items.dtype in (np.int32, np.int64)
    assert got.offsets.dtype == np.int64


@pytest.mark.parametrize(
    "data", [{"items": np.array(EVEN)}, pa.array(EVEN, pa.list_(pa.int64(), 2))], ids=["2-D", "fixed size"]
)
def test_histories_of_one_length(data):
    got = read_histories(data)
    assert (got.items.tolist(), got.offsets.tolist()) == ([1, 2, 3, 4], [0, 2, 4])


@pytest.mark.parametrize("data", [[], {"items": []}, pa.table({"items": column(lists=[])}), np.empty((0, 3), int)])
def test_nothing(data):
    assert len(read_histories(data)) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([3, 4], r"history 0 must be a flat list of integer item ids, got 3; one history is a list in a list"),
        ([[1], [1.5]], r"history 1 must be a flat list of integer item ids, got \[1.5\]"),
        ([[1], 2], "history 1 must be a flat list"),
        ([[1], [[2], [3, 4]]], "history 1 must be a flat list"),
        ([["a"]], r"history 0 must be a flat list of .*, got \['a'\]; ItemIds.known turns those of a log into them"),
        ([[True]], "history 0 must be a flat list"),
        ("abc", "histories must be an Arrow table, a dict of arrays or a list of lists, got str"),
        (5, "got int"),
        ({"user_id": [1]}, "a dict of arrays must hold 'items', or 'values' and 'offsets', got user_id"),
        ({"items": [[1], None]}, r"items\[1\] must be a flat list"),
        ({"values": [1.0], "offsets": [0, 1]}, "values must be a flat array of integers, got float64"),
        ({"values": [1], "offsets": [0, 2]}, r"offsets must run from 0 to len\(values\) = 1"),
        ({"values": [1], "offsets": []}, "offsets must run from 0"),
        ({"values": [1, 2], "offsets": [0, 2, 1, 2]}, "never decrease"),
        (pa.table({"ids": column()}), "the Arrow table must have a column 'items', it has ids"),
        (pa.table({"items": [1, 2]}), "items must be a list column of integers, got int64"),
        (pa.array([[1.5]]), "items must be a list column of integers"),
        (pa.array([[None]]), "items must hold item ids, got 1 nulls"),
        ([[1.5, 2.0]], r"history 0 must be a flat list"),
        (np.ones((2, 3)), r"histories must be integers, got float64 of shape \[2, 3\]"),
        (pa.array([[1], None]), "items must be without nulls, got one in row 1"),
        (pa.array([[1, None]]), "items must hold item ids, got 1 nulls"),
        (pa.array([[9], [1], [], [2, None]]).slice(1), "items must hold item ids, got 1 nulls, the first in row 2"),
        ([[1], [3, True]], r"history 1 must be a flat list of integer item ids, got \[3, True\]"),
        ([[1], [*range(1, 99), None]], "history 1 must be a flat list of integer item ids, got None at place 98"),
        ([[2**70]], r"history 0 must be a .*, got \[1180591620717411303424\]; an id is less than 2\*\*63"),
        ([np.array([1, None])], r"history 0 must be a flat list of integer item ids, got \[1 None\] of object"),
        (np.array(3), "histories must be a list of lists of item ids, got 3"),
        ({"items": 5}, "items must be a list of lists of item ids, got 5"),
        ({"items": None}, "items must be a list of lists of item ids, got None"),
        ({"values": [[1], [2, 3]], "offsets": [0, 1]}, "values must be a flat array of integers"),
    ],
    ids=str,
)
def test_mistakes(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read_histories(data)


def test_mistakes_that_cannot_be_shown():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for history in (deep, [1.5, 10**5000]):
        with pytest.raises(ValueError, match="history 1 must be a flat list of integer item ids, got a list too large"):
            read_histories([[1], history])


def test_a_column_may_have_any_name():
    with pytest.raises(ValueError, match=r"50%\[1\] must be a flat list of integer item ids, got x"):
        read_histories({"50%": [[1], "x"]}, "50%")


def test_chunks_cover_all_and_keep_to_their_size():
    lengths = np.array([0, 5, 9, 0, 0, 40, 1, 3, 7])
    histories = Histories(np.arange(1, lengths.sum() + 1), np.concatenate([[0], lengths.cumsum()]))
    chunks = list(histories.chunks(8, 20))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(9))
    cost = lengths.clip(1, 20)
    assert all(cost[chunk].sum() <= 8 or chunk.stop - chunk.start == 1 for chunk in chunks)


def test_unknown_ids_are_dropped_and_counted():
    histories = read_histories([[9, 1, 2], [0, -4], [], [-(2**63), 3]])
    known, unknown = histories.known(slice(0, 4), 5)
    assert (known.items.tolist(), known.offsets.tolist(), unknown.tolist()) == (
        [1, 2, 3],
        [0, 2, 2, 2, 3],
        [1, 2, 0, 1],
    )
    known, unknown = histories.known(slice(1, 3), 5)
    assert (known.items.tolist(), known.offsets.tolist(), unknown.tolist()) == ([], [0, 0, 0], [2, 0])


def test_items_have_their_own_names_and_a_rank_without_one_has_none(tmp_path):
    names = {"item_id": [1, 2, 3], "original_id": ["71053", "84029", "22752"]}
    pq.write_table(pa.table(names), tmp_path / "items.parquet")
    ids = ItemIds(tmp_path / "items.parquet")
    assert ids.known([84029, "22752", 5]) == [2, 3, 0]
    assert ids.original(np.array([3, 1, 0])) == [22752, 71053, None]
    with pytest.raises(ValueError, match=r"items must be 0 or among those that .*items\.parquet names, got 4"):
        ids.original([1, 4])
    with pytest.raises(TypeError, match="history must be a list of the log's item ids, got '84029'"):
        ids.known("84029")


@pytest.mark.parametrize("name", ["007", "-0", "+7", "1_0", "7.0"])
def test_names_that_a_number_would_not_give_back_stay_text(tmp_path, name):
    names = {"item_id": [1, 2], "original_id": [name, "-8"]}
    pq.write_table(pa.table(names), tmp_path / "items.parquet")
    ids = ItemIds(tmp_path / "items.parquet")
    assert ids.original([1, 2]) == [name, "-8"]
    assert ids.known([name, 7, -8]) == [1, 0, 2]


@pytest.mark.parametrize("data", [pa.array([[], []]), pa.array([[], []], pa.large_list(pa.null())), [[], []]])
def test_new_users_alone(data):
    got = read_histories(data)
    assert (got.items.tolist(), got.offsets.tolist()) == ([], [0, 0, 0])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"original_id": ["a", "a", "b"]}, "original_id must name every item once, got one twice"),
        ({"item_id": [1, 2, 2], "original_id": ["a", "b", "c"]}, "every item once"),
        ({"original_id": ["a", None, "b"]}, "must hold no nulls"),
        ({}, "has no original_id"),
    ],
    ids=str,
)
def test_items_are_named_once(tmp_path, columns, words):
    pq.write_table(pa.table({"item_id": [1, 2, 3]} | columns), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=words):
        ItemIds(tmp_path / "items.parquet")


def test_the_table_of_items_is_a_file(tmp_path):
    for path, words in ((tmp_path, "a folder"), (tmp_path / "other.parquet", "missing")):
        with pytest.raises(FileNotFoundError, match=f"must be the items.parquet of a dataset, it is {words}"):
            ItemIds(path)


class Frame:
    """What of a data frame of pandas or polars is looked at."""

    def __init__(self, **columns):
        self._columns, self.columns = columns, list(columns)

    def __getitem__(self, name):
        return self._columns[name]

    def __len__(self):
        return len(self._columns[self.columns[0]])

    def to_dict(self):
        raise AssertionError("it differs from one package to the other")


def test_a_data_frame_is_a_dict_of_its_columns(tmp_path):
    frame = Frame(user_id=[7, 8, 9, 10], items=[np.array(x) for x in LISTS])
    got = read_histories(frame)
    assert (got.items.tolist(), got.offsets.tolist()) == (sum(LISTS, []), [0, 3, 3, 4, 6])
    with pytest.raises(ValueError, match="a dict of arrays must hold 'seen', .* got user_id, items"):
        read_histories(frame, "seen")
    save_pretrained(make_model("ctr"), tmp_path / "run")
    answer = Predictor(tmp_path / "run", "ctr", keep=["user_id"])(frame)
    assert answer["user_id"].tolist() == [7, 8, 9, 10]
