import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from pcl_ext.data import Dataset, DatasetWriter, check
from pcl_ext.task import TaskSpec


def write(out, users=(1, 2), fail=None, **more):
    with DatasetWriter(out, "tiny", 3, **more) as writer:
        for user in users:
            writer.histories([user], [1, 2, 3], [0, 3], [user % 3])
        writer.task(TaskSpec("t", "binary", labels=["no", "yes"]), [1], [1], [3])
        if fail:
            raise fail


def leftovers(folder):
    return [p.name for p in folder.iterdir() if "tmp" in p.name]


def test_row_groups_are_streamed_and_counted(tmp_path):
    write(tmp_path / "out", users=range(1, 8))
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["counts"] == {"users": {"train": 2, "valid": 3, "test": 2}, "events": 21, "tasks": {"t": 1}}
    assert set(info["sha256"]) == {"histories.parquet", "tasks/t.json", "tasks/t.parquet"}
    dataset = Dataset(tmp_path / "out")
    assert dataset.num_users == 7
    assert dataset.task("t").spec.labels == ("no", "yes")


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt()], ids=repr)
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write(tmp_path / "out", fail=error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="unique"):
        write(tmp_path / "out", users=(1, 1), check=check)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one history"), DatasetWriter(tmp_path / "out", "none", 1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_kept(tmp_path):
    out = tmp_path / "out"
    write(out)
    before = (out / "dataset.json").read_bytes()
    with pytest.raises(FileExistsError, match="out must be a new or an empty folder"):
        write(out, users=(5,))
    assert (out / "dataset.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
        write(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert Dataset(tmp_path / "empty").num_users == 2


def test_the_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in sorted((tmp_path / "a").rglob("*.*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


GOOD = {"user_id": [7, 8], "items": [1, 2, 3, 3, 1], "offsets": [0, 3, 5], "fold": [0, 2]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": [3, 4, 5]}, "offsets must start at 0, never decrease and end at len(items), 5; got 3..5"),
        ({"offsets": [0, 1, 2]}, "end at len(items), 5; got 0..2"),
        ({"offsets": [0, 3, 500_000]}, "end at len(items), 5; got 0..500000"),
        ({"offsets": [0, 6, 5]}, "end at len(items), 5; got 0..5, decreasing"),
        ({"offsets": [0, 5]}, "user_id and fold must be [n] and offsets [n + 1], got 2, 2 and 2 values"),
        ({"offsets": []}, "got 2, 2 and 0 values"),
        ({"offsets": [0, 3, 5 + 2**32]}, "offsets must be in 0..2147483647, got 0..4294967301"),
        ({"offsets": [0.0, 3.0, 5.0]}, "offsets must be integers [n], got float64 [3]"),
        ({"user_id": [7]}, "got 1, 2 and 3 values"),
        ({"user_id": np.array([7, 2**63], np.uint64)}, "user_id must be in"),
        ({"items": [1, 2, 3, 2**32 + 3, 1]}, "items must be in 1..3, got 1..4294967299"),
        ({"items": [1, 2, 3, 0, 1]}, "items must be in 1..3, got 0..3"),
        ({"items": [1.9, 2, 3, 3, 1]}, "items must be integers [n], got float64 [5]"),
        ({"fold": [0, 3]}, "fold must be in 0..2, got 0..3"),
        ({"times": [1, 2, 3]}, "times must be as many as items, 5, got 3"),
        ({"times": [1.5, 2, 3, 4, 5]}, "times must be integers [n]"),
    ],
    ids=str,
)
def test_histories_that_are_no_histories_are_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match="must") as error, DatasetWriter(tmp_path / "out", "tiny", 3) as writer:
        writer.histories(**GOOD | change)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": [0.9]}, "target must be integers [n], got float64 [1]"),
        ({"cut": [2**32 + 1]}, "cut must be in 0..2147483647, got 4294967297..4294967297"),
        ({"user_id": ["7"]}, "user_id must be integers [n], got <U1 [1]"),
        ({"time": [1.5]}, "time must be integers [n], got float64 [1]"),
        ({"user_id": [7, 8]}, "the columns of task 't' must be of one length, got user_id 2, target 1, cut 1"),
    ],
    ids=str,
)
def test_tables_are_not_rounded_or_cut(tmp_path, change, words):
    rows = {"user_id": [7], "target": [1], "cut": [3]} | change
    with pytest.raises(ValueError, match="must") as error, DatasetWriter(tmp_path / "out", "tiny", 3) as writer:
        writer.task(TaskSpec("t", "binary"), **rows)
    assert words in str(error.value)


def test_nobody_and_empty_histories_are_written(tmp_path):
    with DatasetWriter(tmp_path / "out", "tiny", 3) as writer:
        writer.histories([], [], [0], [])
        writer.histories([7, 8], [], [0, 0, 0], [0, 2])
    assert Dataset(tmp_path / "out").offsets.tolist() == [0, 0, 0]


KILLED = """
    import os, time
    from pcl_ext.data import DatasetWriter
    with DatasetWriter({out!r}, "tiny", 3) as writer:
        writer.histories([1], [1, 2, 3], [0, 3], [0])
        print("ready", flush=True)
        time.sleep(60)
"""


def test_a_killed_writer_leaves_no_dataset_and_is_swept(tmp_path):
    out = tmp_path / "out"
    code = textwrap.dedent(KILLED.format(out=str(out)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(leftovers(tmp_path)) == 1
        with pytest.raises(RuntimeError, match="stop"):
            write(out, fail=RuntimeError("stop"))
        assert len(leftovers(tmp_path)) == 1  # a writer that lives is left alone
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert len(leftovers(tmp_path)) == 1
    write(out)
    assert leftovers(tmp_path) == []
    assert Dataset(out).num_users == 2


def test_a_task_is_begun_once(tmp_path):
    with DatasetWriter(tmp_path / "d", "d", 3) as writer:
        writer.histories([1], [1], [0, 1], [0])
        writer.task(TaskSpec("age", "regression"), [1], [3.0], [1])
        with pytest.raises(ValueError, match="task 'age' was begun as TaskSpec"):
            writer.task(TaskSpec("age", "binary"), [1], [1], [1])
    assert len(Dataset(tmp_path / "d").task("age")) == 1
