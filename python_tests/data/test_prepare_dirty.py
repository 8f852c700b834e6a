"""`prepare events` on logs with empty cells, words for missing values, misspelt labels and times that are none."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_log import BASE, LOG, histories, rows, task


def test_events_without_user_item_or_time_are_skipped_on_request(prepare, caplog):
    log = LOG + ",x,6,buy,1\nann,,6,buy,1\nann,y,,buy,1\n"
    with pytest.raises(ValueError, match="'user_id' in 1, 'item_id' in 1, 'time' in 1; skip_empty = true"):
        prepare(BASE, log)
    with caplog.at_level("INFO", "pcl_ext"):
        assert histories(prepare(BASE + "skip_empty = true\nmin_length = 2\n", log)) == {
            "ann": ["z", "x", "w", "x"],
            "bob": ["y", "x", "w"],
        }
    assert "left out: 3 of 11 events, with an empty 'user_id' or 'item_id' or 'time'" in caplog.text
    assert "left out: 1 of 3 users, whose histories have fewer than 2 of the events that count" in caplog.text
    with pytest.raises(ValueError, match=r"log\.csv holds no events"):
        prepare(BASE, LOG.splitlines()[0] + "\n")


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ('where = [["kind", "==", "buy"]]', ["1 of 8 events, which do not satisfy [events] where"]),
        (
            "until = 9",
            [
                "1 of 8 events, not before [events] until, 9",
                "1 of 3 users, whose histories have fewer than 1 of the events that count",
            ],
        ),
        ("distinct = true", ["1 of 8 events, which repeat an item of their user ([events] distinct)"]),
        (
            'where = [["rating", ">=", 2]]\nuntil = 5\ndistinct = true\nmin_length = 2',
            [
                "2 of 8 events, which do not satisfy [events] where",
                "2 of 6 events, not before [events] until, 5",
                "1 of 4 events, which repeat an item of their user ([events] distinct)",
                "2 of 3 users, whose histories have fewer than 2 of the events that count",
            ],
        ),
        (
            '[items]\nfile = "items.csv"\n[[task]]\nname = "t"\nkind = "items"\nsource = "events"\n'
            'items = { where = [["item_id", "==", "w"]] }',
            ["2 of 8 events, of items that tasks keep out of all inputs"],
        ),
        ("", []),
    ],
    ids=str,
)
def test_what_is_left_out_of_histories_is_told(tmp_path, prepare, caplog, keys, want):
    (tmp_path / "items.csv").write_text("item_id\nw\n")
    with caplog.at_level("INFO", "pcl_ext"):
        prepare(BASE + keys)
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if line.startswith("left out")] == [f"left out: {line}" for line in want]


def test_a_key_that_reads_like_a_missing_value_is_none(prepare):
    log = LOG + "NA,x,6,buy,1\nann,null,6,buy,1\n"
    with pytest.raises(ValueError, match="'user_id' in 1, 'item_id' in 1; skip_empty = true"):
        prepare(BASE, log)


def test_misspelt_labels_are_told(prepare, caplog):
    keys = 'kind = "binary"\ncolumn = "city"\nlabels = ["Rome", "oslo"]'
    with caplog.at_level("INFO", "pcl_ext"):
        assert rows(prepare(task(keys)), "t") == [("bob", 0, 3)]
    assert "task 't': labels: no user has 'oslo'; there are 'Oslo', 'Rome'" in caplog.text
    assert "task 't': users left out, with a value that is not among its labels: 1, with 'Oslo'" in caplog.text


@pytest.mark.parametrize("extra", ["", 'time_format = "%Y-%m-%d %H:%M:%S"\n'])
@pytest.mark.parametrize("place", [0, 1, 6])
def test_the_time_that_is_none_is_named(prepare, extra, place):
    times = [f"2023-03-{day:02} 00:00:00" for day in range(1, 9)]
    times[place] = "2023-13-01 00:00:00"
    lines = [f"ann,x,{time},buy,1" for time in times]
    log = "\n".join(["user_id,item_id,time,kind,rating", *lines]) + "\n"
    with pytest.raises(
        ValueError, match=rf"\[events\] time must be .* got '2023-13-01 00:00:00' in row {place + 1} of 8"
    ):
        prepare('name = "shop"\n[events]\nfile = "log.csv"\ntime = "time"\ntext = ["time"]\n' + extra, log)


def test_a_text_that_reads_like_a_missing_number_is_a_text(prepare):
    users = "user_id,age,city\nbob,NA,NA\nann,25,null\ncat,NaN,\ndan,70,Bern\n"
    dataset = prepare(task('kind = "binary"\ncolumn = "city"'), users=users)
    assert rows(dataset, "t") == [("ann", 1, 4), ("bob", 0, 3)]
    assert dataset.task("t").spec.labels == ("NA", "null")
    assert rows(prepare(task('kind = "regression"\ncolumn = "age"'), users=users), "t") == [("ann", 25, 4)]


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_a_parquet_says_itself_what_is_missing(tmp_path, prepare, text):
    """There NA is an id as any other; an empty text is none."""
    table = {"user_id": ["NA", "DE", "NA", ""], "item_id": ["a", "nan", "b", "c"], "time": [1, 2, 3, 4]}
    columns = {name: pa.array(values).cast(text) if name != "time" else values for name, values in table.items()}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    toml = BASE.replace("log.csv", "log.parquet")
    assert histories(prepare(toml + "skip_empty = true\n")) == {"NA": ["a", "b"], "DE": ["nan"]}
    with pytest.raises(ValueError, match="empty cells among 4 rows: 'user_id' in 1"):
        prepare(toml)


@pytest.mark.parametrize("keys", ['kind = "classes"', 'kind = "binary"\npositive = 31', 'kind = "regression"'])
def test_nan_in_a_parquet_is_no_value(tmp_path, prepare, keys):
    ages = pa.array([31.0, 25.0, float("nan"), None])
    pq.write_table(pa.table({"user_id": ["bob", "ann", "cat", "dan"], "age": ages}), tmp_path / "users.parquet")
    toml = task(keys + '\ncolumn = "age"').replace("users.csv", "users.parquet")
    assert {user for user, *_ in rows(prepare(toml), "t")} == {"ann", "bob"}


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ('kind = "classes"', ("25", "31")),
        ('kind = "classes"\nlabels = [31, 25]', ("31", "25")),
        ('kind = "binary"\npositive = 31.0', ("other", "31")),
        ('kind = "binary"\nlabels = [25, 31]', ("25", "31")),
    ],
    ids=str,
)
def test_integers_that_a_gap_made_floats_are_named_as_integers(tmp_path, prepare, keys, names):
    ages = pa.array([31.0, 25.0, None, 31.0])
    pq.write_table(pa.table({"user_id": ["bob", "ann", "cat", "dan"], "age": ages}), tmp_path / "users.parquet")
    toml = task(keys + '\ncolumn = "age"').replace("users.csv", "users.parquet")
    assert prepare(toml).task("t").spec.labels == names


def test_nan_satisfies_no_condition(tmp_path, prepare):
    ratings = [5.0, float("nan"), 4.0]
    table = {"user_id": ["ann"] * 3, "item_id": ["a", "b", "c"], "time": [1, 2, 3], "rating": ratings}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    toml = BASE.replace("log.csv", "log.parquet") + 'where = [["rating", "!=", 5]]\n'
    assert histories(prepare(toml)) == {"ann": ["c"]}


def test_bins_that_would_be_empty_are_refused(prepare):
    log = "user_id,item_id,time\n" + "".join(f"u{i},a,1\n" for i in range(100))
    users = "user_id,count\n" + "".join(f"u{i},{max(0, i - 60)}\n" for i in range(100))
    keys = 'kind = "classes"\ncolumn = "count"\nbins = '
    with pytest.raises(ValueError, match="task 't': bins = 2 leaves 'below 0' empty; give edges yourself"):
        prepare(task(keys + "2"), log=log, users=users)
    assert prepare(task(keys + "[1, 20]"), log=log, users=users).task("t").spec.labels[0] == "below 1"


def test_bins_whose_edges_are_close_have_names_of_their_own(prepare):
    users = "user_id,city,age\nann,x,1234567\nbob,x,1234568\ncat,x,1234569\n"
    dataset = prepare(task('kind = "classes"\ncolumn = "age"\nbins = [1234568, 1234569]'), users=users)
    assert dataset.task("t").spec.labels == ("below 1234568", "1234568 to 1234569", "1234569 or more")


def test_a_quoted_cell_may_have_lines_wherever_the_file_is_cut(prepare):
    text = "line\nof text\n" * 40
    log = "user_id,item_id,time,note\n" + "".join(f'ann,i{n},{n},"{text}"\n' for n in range(5000))
    assert len(histories(prepare(BASE, log))["ann"]) == 5000


def test_ids_that_look_missing_or_padded_are_said(prepare, caplog):
    log = "user_id,item_id,time\nNULL,x,1\nNULL,y,2\nann,x,1\nann ,unknown,2\nbob,y,2\n"
    with caplog.at_level("INFO", "pcl_ext"):
        prepare(BASE, log)
    assert [line for line in caplog.messages if line.startswith("[events]")] == [
        "[events]: 'NULL' in 'user_id' is an id like others, of 2 events; `where` leaves it out",
        "[events]: ids in 'user_id' that begin or end with a blank are others than those without: 1, as 'ann '",
        "[events]: 'unknown' in 'item_id' is an id like others, of 1 events; `where` leaves it out",
    ]
    caplog.clear()
    with caplog.at_level("INFO", "pcl_ext"):
        dataset = prepare(
            BASE + 'where = [["user_id", "!=", "NULL"]]\n', log.replace("ann ", "ann").replace("unknown", "z")
        )
    assert dataset.num_users == 2
