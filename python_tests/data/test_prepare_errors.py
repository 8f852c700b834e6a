"""Every mistake in a TOML file or its tables is named by key, rule and what came; nothing is left behind."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pcl_ext.data import Dataset, prepare_events

GOOD = """\
name = "shop"
[events]
file = "log.csv"
time = "time"
[users]
file = "users.csv"
[items]
file = "items.csv"
[[task]]
name = "age"
kind = "regression"
column = "age"
[[task]]
name = "new"
kind = "items"
source = "events"
items = { modulo = 2 }
"""
LOG = "user_id,item_id,time,price\n" + "".join(f"{i % 5},{i % 7},{i},{i}.5\n" for i in range(40))
USERS = "user_id,age,city\n0,3,a\n1,4,b\n2,5,c\n"
ITEMS = "item_id,kind\n" + "".join(f"{i},k\n" for i in range(7))


def run(folder, toml=GOOD, log=LOG, users=USERS, items=ITEMS):
    for name, text in (("log.csv", log), ("users.csv", users), ("items.csv", items), ("shop.toml", toml)):
        if text is not None:
            (folder / name).write_text(text)
    prepare_events(folder / "shop.toml", folder / "out")


def test_the_good_file_is_good(tmp_path):
    run(tmp_path)
    assert (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "shop"\n', "", "name is missing"),
        ("[events]", "[event]", "unknown key 'event'; known are name, events"),
        ('file = "log.csv"\n', "", "[events]: file is missing"),
        ('time = "time"', "colour = 1", "[events]: unknown key 'colour'"),
        ('time = "time"', "min_length = 1.5", "[events]: min_length must be int, got 1.5"),
        ('time = "time"', "min_length = true", "[events]: min_length must be int, got True"),
        ('time = "time"', 'distinct = "yes"', "[events]: distinct must be bool, got 'yes'"),
        ('time = "time"', 'where = ["price"]', "[events]: where must be a list of [column, op, value], got 'price'"),
        ('time = "time"', 'where = [["price", "=>", 1]]', "op must be one of ==, !=, <"),
        ('time = "time"', 'where = [["price", "in", 1]]', "in and not in take a list"),
        ('time = "time"', 'where = [["cost", ">", 1]]', "neither [events] nor [items] has a column 'cost'"),
        ('time = "time"', 'where = [["price", ">", "a"]]', "price (double) cannot be compared by > with 'a'"),
        ('time = "time"', "min_length = 9", "no user has min_length = 9 events"),
        ('time = "time"', "until = 2011-09-10", "[events] until needs [events] time"),
        (
            'time = "time"',
            'time = "time"\nuntil = "soon"',
            "[events] until must be a date as in 2011-09-10, got 'soon'",
        ),
        ('time = "time"', 'time = "time"\nuntil = 0', "of 40 events in the log"),
        ('time = "time"', 'time = "when"', "has no column 'when'; it has user_id, item_id, time, price"),
        (
            'time = "time"',
            'time = "time"\ntime_unit = "min"',
            "[events] time_unit must be one of s, ms, us, ns, got 'min'",
        ),
        ('time = "time"', 'time_unit = "ms"', "[events]: time_unit is for a log with `time`"),
        ('time = "time"', 'time_format = "%Y"', "[events]: time_format is for a log with `time`"),
        ('time = "time"', "min_length = -3", "[events]: min_length must not be negative, got -3"),
        ('time = "time"', 'time = "time"\ntext = ["item"]', "log.csv has no column 'item'; it has user_id, item_id"),
        (
            'time = "time"',
            'item = "price"',
            "[items] item holds integers where [events] holds text, and as text none is the same: 0 is not in [events]",
        ),
        ('"users.csv"', '"nobody.csv"', "nobody.csv is missing"),
        ('[users]\nfile = "users.csv"\n', "", "task 'age': source users needs a [users] table"),
        ('column = "age"', 'column = "size"', "has no column 'size'"),
        ('column = "age"', 'column = "city"', "must hold numbers, got string, as 'a'"),
        ('column = "age"', "", "task 'age': column is missing"),
        (
            'column = "age"',
            'source = "events"\ncolumn = "price"',
            "task 'age': column is for a reduce that reads it (sum, mean, median, min, max, first, last)",
        ),
        ('column = "age"', 'column = "age"\nbins = 3', "task 'age': bins is not for kind regression"),
        ('column = "age"', 'column = "age"\ncut = "before"', "task 'age': cut is for kind items"),
        ('column = "age"', 'column = "age"\nrepeats = true', "task 'age': repeats is for kind items"),
        ('column = "age"', 'column = "age"\nfrom = 2020-01-01', "task 'age': from is for source = \"events\""),
        ('column = "age"', 'column = "age"\nreduce = "sum"', "task 'age': reduce is for source = \"events\""),
        (
            'source = "events"',
            'source = "events"\ncolumn = "price"',
            "task 'new': column is for other kinds than items",
        ),
        ('kind = "regression"', 'kind = "classes"\nbins = 1', "bins must be a number from 2 up"),
        ('kind = "regression"', 'kind = "classes"\nbins = [3, 2]', "a list of rising edges, got [3, 2]"),
        ('kind = "regression"', 'kind = "classes"\nbins = [2.0, nan]', "task.bins must be finite, got nan"),
        ('kind = "regression"', 'kind = "classes"\nbins = ["1", "5"]', "a list of rising edges, got ['1', '5']"),
        ('kind = "regression"', 'kind = "classes"\nbins = [1, true]', "a list of rising edges, got [1, True]"),
        ('kind = "regression"', 'kind = "classes"\nbins = true', "bins must be int or list, got True"),
        ('kind = "regression"', 'kind = "binary"\nthreshold = nan', "task.threshold must be finite, got nan"),
        ('kind = "regression"', 'kind = "binary"\nlabels = [1, -inf]', "task.labels must be finite, got -inf"),
        ('time = "time"', 'where = [["price", "<", 1e999]]', "events.where must be finite, got inf"),
        ('kind = "regression"', 'kind = "binary"', "task 'age': binary needs 2 values"),
        (
            'kind = "regression"\ncolumn = "age"',
            'kind = "regression"\nsource = "events"\nreduce = "count"\nwhere = [["price", "==", 7]]',
            "task 'age': no event satisfies where, from, until and items",
        ),
        ('kind = "regression"', 'kind = "binary"\nthreshold = 1\npositive = 3', "only one of threshold and positive"),
        ('kind = "regression"', 'kind = "binary"\npositive = "x"', "positive must be values of the column (int64)"),
        (
            'kind = "regression"',
            'kind = "number"',
            "kind must be one of items, binary, classes, regression, got 'number'",
        ),
        (
            'kind = "regression"',
            'kind = "regression"\nmetric = "auc"',
            "task 'age': metric must be one of rmse, mae, got 'auc'",
        ),
        ('name = "age"', 'name = "Age"', "must match [a-z0-9_-]{1,64}, got 'Age'"),
        ('name = "age"', 'name = "new"', "[[task]] names must differ, got new, new"),
        ('name = "age"', 'name = "next"', "next is always there"),
        ('name = "age"\n', "", "[[task]] 1: name is missing"),
        ('source = "events"', "", "kind items needs source"),
        ("{ modulo = 2 }", "{ modulo = 2, remainder = 2 }", "remainder must be in 0..modulo - 1, got 2"),
        ("{ modulo = 2 }", "{ remainder = 3 }", "remainder must be in 0..modulo - 1, got 3 and modulo None"),
        ('kind = "regression"', 'kind = "classes"\nlabels = [3, 4, 4]', "labels must differ, 4 is there twice"),
        ("{ modulo = 2 }", "{ modulo = 0 }", "items: modulo must be 1 or more, got 0"),
        (
            "{ modulo = 2 }",
            "{ modulo = 99999999999999999999 }",
            "task.items.modulo must be an integer of at most 63 bits, got 99999999999999999999",
        ),
        ("{ modulo = 2 }", "{ modulus = 2 }", "unknown key 'modulus'"),
        ("{ modulo = 2 }", "5", "items must be dict, got 5"),
        ("{ modulo = 2 }", '{ where = [["kind", "==", "z"]] }', "must hold at least one item, got none"),
        ("[users]", '[fold]\nby = "date"\n[users]', "needs the dates valid and test"),
        ("[users]", '[fold]\nby = "age"\n[users]', "by must be hash or date, got 'age'"),
        ("[users]", "[fold]\nrotate = 5\n[users]", "rotate must be None or one of 0..4, got 5"),
        ("[users]", "[users", "shop.toml"),
    ],
)
def test_mistakes_in_the_file(tmp_path, old, new, words):
    assert old in GOOD
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(tmp_path, GOOD.replace(old, new, 1))
    assert words in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"users": USERS + "1,7,c\n"}, "[users]: user must be unique, 1 is there twice"),
        ({"users": USERS + ",7,c\n"}, "[users] user must not be null, 1 of 4 rows are"),
        (
            {"users": "user_id,age\nann,3\n"},
            "[users] user holds text where [events] holds integers, and as text none is the same: 'ann' is not in",
        ),
        ({"items": ITEMS + "3,k\n"}, "[items] item must be unique, 3 is there twice"),
        (
            {"log": LOG + "1,,3,1\n"},
            "empty cells among 41 rows: 'item_id' in 1; skip_empty = true leaves",
        ),
        ({"log": LOG + "1,2,,1\n"}, "[events]: empty cells among 41 rows: 'time' in 1; skip_empty"),
        ({"log": LOG + "1,2\n"}, "not readable as CSV"),
        ({"log": "user_id,item_id,time\n"}, "[events]"),
        ({"log": ""}, "not readable as CSV"),
        ({"users": "user_id,age\n7,3\n"}, "task 'age': no user has a value"),
        (
            {"users": "user_id,age\n1,1e31\n"},
            "task 'age': targets must be at most 1e+30 in size, got 1e+31; take a larger unit",
        ),
        ({"log": "user_id,item_id,item_id,time\n1,1,1,1\n"}, "log.csv has two columns 'item_id'"),
    ],
    ids=str,
)
def test_mistakes_in_the_tables(tmp_path, change, words):
    with pytest.raises(ValueError, match=r"\[events\]|\[users\]|\[items\]|task|CSV") as error:
        run(tmp_path, **change)
    assert words in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_date_needs_the_unit_of_the_times(tmp_path):
    log = "user_id,item_id,time\n1,1,1300000000000\n"
    with pytest.raises(ValueError, match="give \\[events\\] time_unit"):
        run(tmp_path, GOOD.replace('time = "time"', 'time = "time"\nuntil = 2011-09-10'), log=log)


def test_ids_of_more_than_63_bits_are_named(tmp_path):
    table = {"user_id": pa.array([2**63 + 1], pa.uint64()), "item_id": [1], "time": [1], "price": [1.0]}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    with pytest.raises(
        ValueError, match=r"\[events\] user must be whole numbers of at most 63 bits, or text: .*9223372036854775809"
    ):
        run(tmp_path, GOOD.replace("log.csv", "log.parquet"))


def test_large_whole_labels_are_rounded_as_floats_are(tmp_path):
    run(tmp_path, users=f"user_id,age\n1,{2**60 + 1}\n")
    assert Dataset(tmp_path / "out").task("age").target.tolist() == [2.0**60]


def test_a_missing_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="config must be a TOML file"):
        prepare_events(tmp_path / "none.toml", tmp_path / "out")


def test_a_truncated_parquet_log(tmp_path):
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"\[events\]: .*log.parquet is not a readable Parquet file"):
        run(tmp_path, GOOD.replace("log.csv", "log.parquet"))
