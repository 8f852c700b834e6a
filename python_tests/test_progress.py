"""Progress where stderr is no terminal: a line a minute, and none of what is soon done."""

import logging
from unittest import mock

from pcl_ext import progress
from pcl_ext.progress import Lines


def test_where_nobody_sees_a_bar_a_line_a_minute_says_how_far_it_is(caplog):
    clock = [0.0, 59.0, 61.0, 61.0, 100.0, 122.0, 122.0]
    with caplog.at_level(logging.INFO, "pcl_ext"), mock.patch.object(progress.time, "monotonic", side_effect=clock):
        with progress.progress("reading", 10_000, " rows", done=500) as bar:
            assert isinstance(bar, Lines)
            for _ in range(4):
                bar.update(1000)
    assert [record.getMessage() for record in caplog.records] == [
        "reading: 2,500 of 10,000 rows",
        "reading: 4,500 of 10,000 rows",
    ]


def test_on_a_terminal_there_is_a_bar():
    with mock.patch.object(progress.sys, "stderr") as stderr:
        stderr.isatty.return_value = True
        with progress.progress("reading", 10, done=4) as bar:
            assert (bar.n, bar.total, bar.unit) == (4, 10, " users")
        with mock.patch.dict("sys.modules", {"tqdm": None}):
            assert isinstance(progress.progress("reading", 10), Lines)
