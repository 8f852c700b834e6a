"""What items.parquet says the item ids are."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_log import BASE, originals, rows

from pcl_ext.data import Dataset


@pytest.fixture
def digest(write_folder):
    """item_ids_sha256 of a dataset whose items.parquet holds these columns."""

    def of(count, **columns):
        folder = write_folder()
        pq.write_table(pa.table(columns), folder / "items.parquet")
        return Dataset(folder).item_ids_sha256(count)

    return of


def test_ids_are_compared_up_to_a_count_in_any_order(digest):
    want = digest(2, item_id=[1, 2], original_id=["a", "b"])
    assert digest(2, item_id=pa.array([3, 2, 1], pa.int32()), original_id=["c", "b", "a"]) == want
    assert digest(2, item_id=[1, 2, 3], original_id=["ab", "", "c"]) != want
    assert digest(3, item_id=[1, 2, 3], original_id=["a", "b", "c"]) != want
    assert digest(2, item_id=[1, 2], original_id=["b", "a"]) != want


def test_numbers_are_the_ids_that_their_text_is(digest):
    assert digest(2, item_id=[1, 2], original_id=[7, 30]) == digest(2, item_id=[1, 2], original_id=["7", "30"])


def test_without_original_ids_there_is_no_hash(digest, write_folder):
    assert Dataset(write_folder()).item_ids_sha256(2) is None
    assert digest(2, item_id=[1, 2]) is None


def test_items_that_are_no_table_are_refused(digest):
    with pytest.raises(ValueError, match=r"items.parquet: item_id and original_id must hold no nulls"):
        digest(2, item_id=[1, 2], original_id=["a", None])
    with pytest.raises(ValueError, match=r"items.parquet: item_id must hold integers, original_id integers or text"):
        digest(2, item_id=["x", "y"], original_id=["a", "b"])


def prepared_again(prepare, tmp_path, log, keys="", **more):
    """A dataset of LOG, and one of `log` that keeps its items' ids."""
    old = prepare(BASE)
    new = prepare(f'{BASE}item_ids = "{old.path.name}/items.parquet"\n{keys}', log, **more)
    return old, new


def test_an_earlier_datasets_items_keep_their_ids(prepare, tmp_path, caplog):
    """a sorts before all earlier ones, and nobody buys z and w any more."""
    log = "user_id,item_id,time\nann,x,1\nann,a,2\nbob,y,1\nbob,b,3\n"
    with caplog.at_level("INFO", "pcl_ext"):
        old, new = prepared_again(prepare, tmp_path, log)
    assert originals(old, "items.parquet", "item_id") == {1: "w", 2: "x", 3: "y", 4: "z"}
    assert originals(new, "items.parquet", "item_id") == {1: "w", 2: "x", 3: "y", 4: "z", 5: "a", 6: "b"}
    assert new.items.tolist() == [2, 5, 3, 6]
    assert new.num_items == 6
    assert new.item_ids_sha256(4) == old.item_ids_sha256(4) != new.item_ids_sha256(5)
    assert "[events] item_ids: 4 items keep their ids, 2 of them not in the log; 2 are new" in caplog.text
    assert [source["file"] for source in new.info["sources"]] == ["log.csv", "items.parquet"]


def test_ids_that_are_numbers_are_kept_too(prepare, tmp_path):
    old = prepare(BASE, "user_id,item_id,time\n1,30,1\n1,7,2\n")
    new = prepare(f'{BASE}item_ids = "{old.path}/items.parquet"\n', "user_id,item_id,time\n1,9,1\n1,30,2\n")
    assert (old.items.tolist(), new.items.tolist()) == ([2, 1], [3, 2])


def test_targets_and_catalogues_follow_the_ids(prepare, tmp_path):
    log = "user_id,item_id,time\nann,x,1\nann,a,2\nbob,y,1\nbob,b,3\n"
    keys = (
        'until = 2\n[[task]]\nname = "t"\nkind = "items"\nsource = "events"\n'
        'items = { where = [["kind", "==", "new"]] }\n[items]\nfile = "items.csv"\n'
    )
    (tmp_path / "items.csv").write_text("item_id,kind\na,new\nx,old\nw,new\nc,new\n")
    _, new = prepared_again(prepare, tmp_path, log, keys)
    names = originals(new, "items.parquet", "item_id")
    assert list(names.values()) == ["w", "x", "y", "z", "a", "c"]
    assert rows(new, "t") == [("ann", "a", 1)]
    assert new.task("t").spec.catalogue == tuple(sorted(item for item, name in names.items() if name in "awc"))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"item_id": [1, 3], "original_id": ["x", "y"]}, "must name the items 1..V of a dataset, each once"),
        ({"item_id": [1, 2], "original_id": ["x", "x"]}, "must name the items 1..V of a dataset, each once"),
        ({"item_id": [1, 2]}, "must name the items 1..V of a dataset, each once"),
        ({"item_id": [1, 2], "original_id": ["q", "r"]}, "item_ids: none of its 2 items, as q, is in the log"),
        (None, "is missing"),
    ],
    ids=str,
)
def test_a_table_that_is_not_of_these_items_is_refused(prepare, tmp_path, columns, words):
    if columns is not None:
        pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare(BASE + 'item_ids = "items.parquet"\n')
