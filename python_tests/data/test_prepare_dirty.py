"""`prepare events` on logs with empty cells, words for missing values, misspelt labels and times that are none."""

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
    with pytest.raises(ValueError, match=r"\[events\] time must be .* got '2023-13-01 00:00:00'"):
        prepare('name = "shop"\n[events]\nfile = "log.csv"\ntime = "time"\ntext = ["time"]\n' + extra, log)


def test_a_text_that_reads_like_a_missing_number_is_a_text(prepare):
    users = "user_id,age,city\nbob,NA,NA\nann,25,null\ncat,NaN,\ndan,70,Bern\n"
    dataset = prepare(task('kind = "binary"\ncolumn = "city"'), users=users)
    assert rows(dataset, "t") == [("ann", 1, 4), ("bob", 0, 3)]
    assert dataset.task("t").spec.labels == ("NA", "null")
    assert rows(prepare(task('kind = "regression"\ncolumn = "age"'), users=users), "t") == [("ann", 25, 4)]
