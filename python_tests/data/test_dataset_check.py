import logging
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcl_ext import progress
from pcl_ext.data import Dataset, DatasetWriter, check, check_task
from pcl_ext.task import TaskSpec

TIMES = [[1, 2, 3], [4, 5], [], [1, 1, 2, 3, 5, 8], [9]]
TOY = {"name": "toy", "kind": "items"}


def test_good_folders_pass(write_folder, toy):
    check(toy)
    rows = {"user_id": [10, 13, 13], "target": [7, 6, 5], "cut": [3, 6, 5], "time": [3, 8, 5]}
    check(write_folder(header={"distinct": True}, times=pa.array(TIMES), task=TOY, rows=rows))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"times": pa.array([[1, 2, 3], [4, 5], [], [1, 1, 2, 3, 5, 4], [9]])},
            "times must not decrease, got 4 in row 3",
        ),
        (
            {"header": {"distinct": True}, "items": pa.array([[1], [2], [], [3, 2, 3], [4]])},
            "items must not repeat, got 3 twice in row 3",
        ),
        (
            {"task": TOY, "rows": {"user_id": [10, 13], "target": [7, 2], "cut": [3, 3]}},
            "target must not be among the first 3 items of the history, got 2 in row 1",
        ),
        (
            {
                "times": pa.array(TIMES),
                "task": TOY,
                "rows": {"user_id": [14, 13], "target": [7, 6], "cut": [0, 5], "time": [0, 4]},
            },
            "time must not be before the last visible event, 5, got 4 in row 1",
        ),
    ],
    ids=["times", "distinct", "seen", "time"],
)
def test_leaks_are_named(write_folder, change, words):
    with pytest.raises(ValueError, match="parquet") as error:
        check(write_folder(**change))
    assert words in str(error.value)


def test_repeats_may_be_seen(write_folder):
    rows = {"user_id": [13, 10], "target": [2, 3], "cut": [3, 3]}
    check(write_folder(task=TOY | {"repeats": True}, rows=rows))


def test_an_item_after_the_cut_is_no_leak(write_folder):
    check(write_folder(task=TOY, rows={"user_id": [13, 13], "target": [2, 5], "cut": [2, 5]}))


@mock.patch("os.fsync", new=mock.Mock())  # of hundreds of files that nobody keeps
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_checker_agrees_with_the_definition(tmp_path_factory, data):
    """Of five tables over the same histories each."""
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    items = data.draw(st.lists(st.integers(1, 4), min_size=sum(lengths), max_size=sum(lengths)))
    offsets = np.r_[0, np.cumsum(lengths)]
    row = st.integers(0, len(lengths) - 1).flatmap(
        lambda u: st.tuples(st.just(u), st.integers(0, lengths[u]), st.integers(1, 4))
    )
    tables = data.draw(st.lists(st.lists(row, min_size=1, max_size=8), min_size=5, max_size=5))
    leaks = [any(target in items[offsets[u] : offsets[u] + cut] for u, cut, target in rows) for rows in tables]
    out = tmp_path_factory.mktemp("check") / "data"
    with DatasetWriter(out, "random", 4) as writer:
        writer.histories(np.arange(len(lengths)), items, offsets, np.zeros(len(lengths), int))
        for place, rows in enumerate(tables):
            users, cuts, targets = zip(*rows, strict=True)
            writer.task(TaskSpec(f"toy{place}", "items"), users, targets, cuts)
    dataset = Dataset(out)
    for place, leak in enumerate(leaks):
        with refused() if leak else nullcontext():
            check_task(dataset, f"toy{place}")
    with refused() if any(leaks) else nullcontext():
        dataset.check()


def refused():
    return pytest.raises(ValueError, match="target must not be among")


def test_the_look_at_a_table_says_how_far_it_is(toy, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "pcl_ext"):
        check(toy)
    assert [text for text in caplog.messages if text.startswith("checking")] == [
        "checking histories.parquet: 5 of 5 users",
        "checking more.parquet: 5 of 5 users",
    ]
