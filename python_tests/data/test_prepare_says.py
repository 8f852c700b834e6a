"""What `prepare events` says of its work and of what is left out, and what it refuses before it reads a log."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_log import BASE, LOG, USERS_TOML, task

from pcl_ext.data import DatasetWriter, events, prepare_events, writer


@pytest.fixture
def said(prepare, caplog):
    """The lines that are logged while a TOML file is prepared."""

    def run(toml, *tables, **more):
        caplog.clear()
        with caplog.at_level("INFO", "pcl_ext"):
            prepare(toml, *tables, **more)
        return [record.getMessage() for record in caplog.records]

    return run


def test_users_and_items_without_a_partner_are_counted(said, tmp_path):
    (tmp_path / "items.csv").write_text("item_id,kind\nx,a\ny,b\nq,c\n")
    toml = (
        BASE + USERS_TOML + '[items]\nfile = "items.csv"\n[[task]]\nname = "t"\nkind = "regression"\ncolumn = "age"\n'
    )
    lines = said(toml + '[[task]]\nname = "u"\nkind = "binary"\ncolumn = "city"\n')
    for line in (
        "[users]: 1 of 3 users with a history have no row",  # cat
        "[users]: 1 of 3 rows are of no user of the log",  # dan
        "[items]: 2 of 4 items of the log have no row",  # z and w
    ):
        assert lines.count(line) == 1
    whole = "user_id,item_id,time\nann,x,1\nbob,y,2\nbob,q,2\ndan,x,1\n"
    assert not [line for line in said(toml, whole) if line.startswith(("[users]", "[items]"))]


def test_long_work_and_the_folds_are_said(said):
    log = "user_id,item_id,time\n" + "".join(f"u{i},a,1\n" for i in range(300))
    lines = said(BASE, log)
    assert lines[:2] == ["reading log.csv", "sorting 300 events"]
    assert "users: train 245, valid 7, test 48" in lines
    assert not [line for line in lines if line.startswith("no ")]
    lines = said(BASE, "user_id,item_id,time\nann,x,1\nann,y,2\n")
    ways = 'to train on this dataset give it some by [fold] rotate or --rotate 0 to 4, by = "date", or another `name`'
    (line,) = [line for line in lines if line.startswith("no ")]
    assert line.count("no ") == 2
    assert line.endswith(f"users: {ways}")
    lines = said(BASE + '[fold]\nby = "date"\nvalid = 20\ntest = 30\n')
    (line,) = [line for line in lines if line.startswith("no ")]
    assert "other dates [fold] valid and test" in line
    assert "rotate" not in line


def test_train_users_whose_histories_run_past_the_date_of_test_are_said(said):
    lines = said(BASE + '[fold]\nby = "date"\nvalid = 2\ntest = 5\n', LOG.replace("bob,y,1", "bob,y,3"))
    assert not [line for line in lines if line.startswith("[fold]")]
    lines = said(BASE + '[fold]\nby = "date"\nvalid = 2\ntest = 3\n')
    what = "[fold] by date: 4 of 7 events of train users are not before test, 3: histories run on past it"
    assert what in lines


def test_classes_of_numbers_with_a_fraction_are_refused(prepare, tmp_path):
    def of(ages, keys=""):
        table = {"user_id": ["ann", "bob", "cat"], "age": pa.array(ages)}
        pq.write_table(pa.table(table), tmp_path / "users.parquet")
        return prepare(task(f'kind = "classes"\ncolumn = "age"\n{keys}').replace("users.csv", "users.parquet"))

    text = "task 't': classes of numbers that are not whole need bins or labels, got 2.5 among 2 values"
    with pytest.raises(ValueError, match=text):
        of([2.5, 3.0, None])
    assert of([2.0, 3.0, None]).task("t").spec.num_classes == 2  # integers, but for a missing value
    assert of([2.5, 3.0, 4.0], "bins = [3]").task("t").spec.num_classes == 2
    assert of([2.5, 3.0, 4.0], "labels = [2.5, 3.0]").task("t").spec.num_classes == 2


def test_an_out_that_cannot_be_written_is_refused_before_the_log_is_read(tmp_path, monkeypatch):
    (tmp_path / "shop.toml").write_text(BASE)
    monkeypatch.setattr(events, "read_table", lambda *args: pytest.fail("the log was read"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out must be a new or an empty folder, got .*full"):
        prepare_events(tmp_path / "shop.toml", tmp_path / "full")
    with pytest.raises(PermissionError, match=r"out must lie in a folder that can be written, .*mine is none"):
        prepare_events(tmp_path / "shop.toml", tmp_path / "full" / "mine" / "deep" / "out")
    monkeypatch.setattr(writer.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=r"out must lie in a folder that can be written, .* is none"):
        prepare_events(tmp_path / "shop.toml", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_of_two_writers_the_later_one_is_told(tmp_path):
    out = tmp_path / "out"

    def write(then):
        with DatasetWriter(out, "d", 1, check=then) as dataset:
            dataset.histories([1], [1], [0, 1], [0])

    with pytest.raises(FileExistsError, match="out must be a new or an empty folder, got .*out"):
        write(lambda folder: write(None))
    assert os.listdir(tmp_path) == ["out"]


def test_a_word_for_a_missing_value_that_is_a_class_is_said(said, tmp_path):
    users = {"user_id": ["ann", "bob", "cat"], "job": ["NA", "cook", "NA"]}
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    toml = task('kind = "classes"\ncolumn = "job"\n').replace("users.csv", "users.parquet")
    line = 'task \'t\': "NA" is a class, of 2 users; ignore = ["NA"] leaves them out'
    assert line in said(toml)
    assert line not in said(toml + 'labels = ["NA", "cook"]\n')  # whoever names it means it


def test_a_log_without_a_time_is_said_to_keep_its_order(said):
    line = "[events] time is left out: events keep the order of the file"
    assert line in said(BASE.replace('time = "time"\n', ""))
    assert line not in said(BASE)


def test_a_log_that_calls_its_items_otherwise_hears_of_the_key(prepare):
    text = "has no column 'item_id'; it has user_id, movie, time; `item` says which column it is"
    with pytest.raises(ValueError, match=text):
        prepare(BASE, "user_id,movie,time\nann,x,1\n")


def test_users_without_a_value_and_rare_classes_are_said(said):
    users = [f"u{i}" for i in range(60)]
    log = "user_id,item_id,time\n" + "".join(f"{user},a,1\n" for user in users)
    jobs = ["", "judge"] + ["cook", "nurse"] * 29
    table = "user_id,job\n" + "".join(f"{user},{job}\n" for user, job in zip(users, jobs, strict=True))
    lines = said(task('kind = "classes"\ncolumn = "job"\n'), log, table)
    assert "task 't': users left out, without a value: 1 of 60" in lines
    assert "task 't': classes with fewer than 10 train users: 1 of 3; 'judge' has 1" in lines
    assert "task 't': classes with fewer than 10 train users: 1 of 2; 'judge' has 1" in said(
        task('kind = "binary"\ncolumn = "job"\npositive = "judge"\n'), log, table
    )
    lines = said(task('kind = "classes"\ncolumn = "job"\nlabels = ["cook", "nurse"]\n'), log, table)
    assert not [line for line in lines if "than 10 train users" in line]


def test_targets_that_the_history_holds_are_said(said):
    toml = BASE + 'until = 4\n[[task]]\nname = "t"\nkind = "items"\nsource = "events"\nfrom = 4\n'
    line = "task 't': targets left out, items of the visible history: 1 of 3; repeats = true keeps them"  # ann's x
    assert line in said(toml)
    assert line not in said(toml + "repeats = true\n")


def test_infinite_values_are_said(said):
    users = "user_id,age\nann,31\nbob,inf\ncat,-inf\n"
    for kind in ('kind = "regression"\n', 'kind = "binary"\nthreshold = 20\n'):
        lines = said(task(f'{kind}column = "age"\n'), users=users)
        assert "task 't': infinite values, taken for missing ones: 2 of 3" in lines
    log = "user_id,item_id,time,price\nann,x,1,2\nann,y,2,inf\nbob,x,1,3\n"
    mean = '[[task]]\nname = "t"\nkind = "regression"\nsource = "events"\nreduce = "mean"\ncolumn = "price"\n'
    assert "task 't': infinite values, taken for missing ones: 1 of 3" in said(BASE + mean, log)
    assert not [line for line in said(BASE + mean, log.replace("inf", "5")) if "infinite" in line]
