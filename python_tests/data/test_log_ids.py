"""Ids of logs and tables: when they are integers, when text, and what is no id."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_log import BASE, histories, originals, task

from pcl_ext.data import tablefile

HEAD = "user_id,item_id,time\n"
PARQUET = BASE.replace("log.csv", "log.parquet")


def log_of(ids, column):
    """One event an id; the other column holds 1."""
    return HEAD + "".join(f"{x},1,{t}\n" if column == "user_id" else f"1,{x},{t}\n" for t, x in enumerate(ids))


def write_log(folder, **columns):
    table = {"user_id": ["ann"] * 2, "item_id": ["a", "b"], "time": [1, 2]} | columns
    pq.write_table(pa.table(table), folder / "log.parquet")


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize(
    ("ids", "want", "told"),
    [
        (["7", "-4", "0", str(2**63 - 1)], ["-4", "0", "7", str(2**63 - 1)], None),
        (['"7"', "9"], ["7", "9"], None),
        (["7.0", "10.0"], ["7", "10"], None),  # as pandas writes integers of a column with gaps
        (["7", "007"], ["007", "7"], "'007'"),
        (["7", '"007"'], ["007", "7"], "'007'"),
        (["7", "-0", "0"], ["-0", "0", "7"], "'-0'"),
        (["7", "+7"], ["+7", "7"], "'+7'"),
        (["7", "0x7"], ["0x7", "7"], "'0x7'"),
        (["7", "7.0"], ["7", "7.0"], "'7.0'"),
        (["7.0", "7.5"], ["7.0", "7.5"], "'7.0'"),
        (["7", " 7"], [" 7", "7"], "' 7'"),
        (["7", str(2**63)], ["7", str(2**63)], f"'{2**63}'"),
        (["ann", "7", "007"], ["007", "7", "ann"], None),
    ],
    ids=str,
)
def test_ids_are_integers_where_all_are_written_so(prepare, caplog, column, ids, want, told):
    with caplog.at_level("INFO", "pcl_ext"):
        dataset = prepare(BASE, log_of(ids, column))
    if column == "item_id":
        assert list(originals(dataset, "items.parquet", "item_id").values()) == want
    elif told or "ann" in ids:
        assert list(originals(dataset, "users.parquet", "user_id").values()) == want
    else:
        assert dataset.user_id.tolist() == [int(x) for x in want]
    line = f"[events]: the ids in '{column}' stay text, {told} is not written as an integer of at most 63 bits is"
    assert (line in caplog.text) == (told is not None) == ("stay text" in caplog.text)


def test_one_id_that_is_none_among_many_chunks(prepare, monkeypatch):
    """A CSV is read in blocks: what holds for the first need not for the last."""
    monkeypatch.setattr(tablefile, "_BLOCK", 1 << 10)
    ids = [*range(10**6, 10**6 + 2_000), "0001000000"]
    dataset = prepare(BASE, log_of(ids, "item_id"))
    assert dataset.num_items == len(ids)


def test_integers_with_empty_cells_are_integers(prepare):
    log = HEAD + "7,a,1\n,a,2\nNA,a,3\n10,a,4\n"
    with pytest.raises(ValueError, match="'user_id' in 2; skip_empty = true"):
        prepare(BASE, log)
    assert prepare(BASE + "skip_empty = true\n", log).user_id.tolist() == [7, 10]
    with pytest.raises(ValueError, match=r"\[users\] user must not be null, 1 of 2 rows are"):
        prepare(task('kind = "regression"\ncolumn = "age"'), HEAD + "7,a,1\n", "user_id,age\n7,1\nNA,2\n")


LABEL = 'kind = "regression"\ncolumn = "age"'


@pytest.mark.parametrize(
    ("log", "users", "want"),
    [
        ("7,a,1\n10,a,1\n", "user_id,age\n007,1\n10,2\n", {"10": 2.0}),
        ("007,a,1\n10,a,1\n", "user_id,age\n7,1\n10,2\n", {"10": 2.0}),
        ("007,a,1\n7,a,1\n", "user_id,age\n7,1\n007,2\n", {"7": 1.0, "007": 2.0}),
    ],
)
def test_users_of_another_type_are_compared_as_text(prepare, caplog, log, users, want):
    with caplog.at_level("INFO", "pcl_ext"):
        dataset = prepare(task(LABEL), HEAD + log, users)
    if (dataset.path / "users.parquet").exists():
        names = originals(dataset, "users.parquet", "user_id")
    else:
        names = {user: str(user) for user in dataset.user_id.tolist()}
    table = dataset.task("t")
    got = {names[int(dataset.user_id[row])]: x for row, x in zip(table.user, table.target.tolist(), strict=True)}
    assert got == want
    assert ("compared as text" in caplog.text) == (len(want) == 1)


@pytest.mark.parametrize(("log", "items"), [(["7", "10"], ["007", "10"]), (["007", "10"], ["7", "10"])])
def test_items_of_another_type_are_compared_as_text(prepare, tmp_path, log, items):
    (tmp_path / "items.csv").write_text("item_id\n" + "".join(f"{x}\n" for x in items))
    dataset = prepare(BASE + '[items]\nfile = "items.csv"\n', log_of(log, "item_id"))
    assert list(originals(dataset, "items.parquet", "item_id").values()) == ["007", "10", "7"]


def test_a_parquet_and_a_csv_are_compared_as_text_too(tmp_path, prepare, caplog):
    write_log(tmp_path, user_id=[7, 10])
    toml = task(LABEL).replace("log.csv", "log.parquet")
    with caplog.at_level("INFO", "pcl_ext"):
        assert len(prepare(toml, users="user_id,age\n007,1\n10,2\n").task("t")) == 1
    assert "[users] user holds text where [events] holds integers: compared as text" in caplog.text
    with pytest.raises(ValueError, match=r"'007' is not in \[events\], which has 7; write ids alike .* `text` keeps"):
        prepare(toml, users="user_id,age\n007,1\n010,2\n")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "string_view", pa.dictionary(pa.int8(), pa.string())])
def test_all_kinds_of_text_of_a_parquet(tmp_path, prepare, kind):
    if kind == "string_view":
        try:
            kind = pa.string_view()
            pa.array(["a"]).cast(kind)
        except (AttributeError, pa.ArrowNotImplementedError):
            pytest.skip("this pyarrow has no string_view, or does not cast to it")
    write_log(tmp_path, item_id=pa.array(["b", "a"]).cast(kind))
    assert histories(prepare(PARQUET + 'where = [["item_id", "!=", "c"]]\n')) == {"ann": ["b", "a"]}


def test_whole_floats_of_a_parquet_are_integers(tmp_path, prepare):
    write_log(tmp_path, user_id=[7.0, float("nan")], item_id=[3.0, 4.0])
    assert histories(prepare(PARQUET + "skip_empty = true\n")) == {"7": ["3"]}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (pa.array([7.0, 7.5]), "must be whole numbers of at most 63 bits, or text: Float value 7.5"),
        (pa.array([7.0, 2.0**53 + 2]), "must be integers or text: double is rounded beyond 9,007,199,254,740,992, got"),
        (pa.array([7.0, 2.0**24 + 2], pa.float32()), "must be integers or text: float is rounded beyond 16,777,216"),
        (pa.array([b"a", b"b"]), "must hold integers or text, got binary; `text` names columns to read as text"),
    ],
    ids=str,
)
def test_what_is_no_id_in_a_parquet(tmp_path, prepare, ids, words):
    write_log(tmp_path, item_id=ids)
    with pytest.raises(ValueError, match=r"\[events\] item must") as error:
        prepare(PARQUET)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("ids", "want"),
    [(pa.array([b"a", b"b"]), ["a", "b"]), (pa.array([7, 10]), ["7", "10"]), (pa.array([7.0, 10.0]), ["7", "10"])],
    ids=str,
)
def test_text_names_columns_of_a_parquet_too(tmp_path, prepare, ids, want):
    write_log(tmp_path, user_id=ids)
    dataset = prepare(PARQUET + 'text = ["user_id"]\n')
    assert sorted(originals(dataset, "users.parquet", "user_id").values()) == sorted(want)
    with pytest.raises(ValueError, match=r"log\.parquet has no column 'user'"):
        prepare(PARQUET + 'text = ["user"]\n')
    write_log(tmp_path, user_id=[b"\xe9", b"b"])
    with pytest.raises(ValueError, match=r"log\.parquet: column 'user_id' cannot be read as text: Invalid UTF8"):
        prepare(PARQUET + 'text = ["user_id"]\n')


@pytest.mark.parametrize("key", ['delimiter = ";"', "quote = ''", 'encoding = "latin-1"', 'columns = ["a"]'])
def test_keys_of_a_csv_are_refused_with_a_parquet(tmp_path, prepare, key):
    write_log(tmp_path)
    with pytest.raises(ValueError, match=rf"\[events\]: {key.split()[0]} is for a CSV, .*log\.parquet is Parquet"):
        prepare(PARQUET + key + "\n")
