"""Files of a dataset that changed, are not what they should be, or find no room for what is made of them."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pcl_ext.data import Dataset, DatasetWriter, check
from pcl_ext.data import cache as cache_module
from pcl_ext.data.writer import file_sha256
from pcl_ext.task import TaskSpec

VIP = {"name": "vip", "kind": "binary"}
ROWS = {"user_id": [10, 13], "target": [1, 0], "cut": [3, 6]}


def test_a_table_of_the_same_size_and_time_is_read_again(write_folder):
    path = write_folder(task=VIP, rows=ROWS) / "tasks" / "vip.parquet"
    assert Dataset(path.parent.parent).task("vip").target.tolist() == [1, 0]
    was = path.stat()
    pq.write_table(pa.table(ROWS | {"target": [0, 1]}), path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert Dataset(path.parent.parent).task("vip").target.tolist() == [0, 1]


@pytest.mark.parametrize("mark", ["st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_a_file_that_differs_in_one_mark_is_another(mark):
    def key(**marks):
        stat = SimpleNamespace(**dict.fromkeys(["st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"], 1) | marks)
        return cache_module.identity([SimpleNamespace(name="vip.parquet", stat=lambda: stat)])

    assert key() == key() != key(**{mark: 2})


@pytest.fixture
def recorded(tmp_path):
    """A dataset whose dataset.json records its files."""
    with DatasetWriter(tmp_path / "shop", "shop", 3) as writer:
        writer.histories([7, 8], [1, 2, 3], [0, 2, 3], [0, 2])
        writer.items([1, 2, 3], ["tea", "mug", "vase"])
        writer.task(TaskSpec("vip", "binary"), [7, 8], [1, 0], [2, 1])
    Dataset(tmp_path / "shop").task("vip")
    return tmp_path / "shop"


CHANGES = {
    "tasks/vip.parquet": lambda path: pq.write_table(pa.table({"user_id": [7], "target": [0], "cut": [1]}), path),
    "tasks/vip.json": lambda path: path.write_text('{"name": "vip", "kind": "regression"}'),
    "items.parquet": lambda path: pq.write_table(pa.table({"item_id": [1, 2], "original_id": ["a", "b"]}), path),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_is_not_the_recorded_one_is_refused_until_its_entry_is_removed(recorded, name):
    CHANGES[name](recorded / name)

    def use():
        dataset = Dataset(recorded)
        return dataset.item_ids_sha256(2) if name == "items.parquet" else dataset.task("vip")

    text = rf"{name} must have the sha256 that dataset.json gives.*remove its entry from \"sha256\" in dataset.json"
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            use()
    info = json.loads((recorded / "dataset.json").read_text())
    del info["sha256"][name]
    (recorded / "dataset.json").write_text(json.dumps(info))
    assert use()


def test_a_table_is_compared_with_the_entry_that_is_there_now(recorded):
    info = json.loads((recorded / "dataset.json").read_text())
    info["sha256"]["tasks/vip.parquet"] = "0" * 64
    (recorded / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"vip.parquet must have the sha256 that dataset.json gives, 0000"):
        Dataset(recorded).task("vip")


def test_a_table_that_is_added_later_needs_no_entry(recorded):
    (recorded / "tasks" / "late.json").write_text('{"name": "late", "kind": "binary"}')
    pq.write_table(pa.table({"user_id": [7], "target": [1], "cut": [2]}), recorded / "tasks" / "late.parquet")
    assert Dataset(recorded).task("late").target.tolist() == [1]


def test_a_table_is_hashed_once(recorded, monkeypatch):
    read = []
    monkeypatch.setattr("pcl_ext.data.dataset.file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    Dataset(recorded).task("vip")
    assert read == ["vip.json"]  # of the table what was made of it is there
    (cache,) = (recorded / ".cache").glob("task-vip-*")
    (cache / "cut.npy").unlink()
    read.clear()
    dataset = Dataset(recorded)
    check(dataset)
    dataset.task_sha256("vip")
    assert sorted(read) == ["vip.json", "vip.parquet"]


@pytest.mark.parametrize("kind", [{"kind": "binary"}, {"kind": "classes", "num_classes": 2}, {"kind": "regression"}])
def test_several_labels_of_a_user_at_one_cut_are_told(write_folder, caplog, kind):
    rows = {"user_id": [13, 10, 13, 13], "target": [1, 0, 0, 1], "cut": [6, 3, 5, 6]}
    assert len(Dataset(write_folder(task={"name": "toy"} | kind, rows=rows)).task("toy")) == 4
    said = "1 of 4 rows are a further label of a user at the same cut, first user 13 in rows 0 and 3: each is learned"
    assert said in caplog.text
    caplog.clear()
    rows = {name: values[:3] for name, values in rows.items()}
    assert len(Dataset(write_folder(task={"name": "toy"} | kind, rows=rows)).task("toy")) == 3
    assert not caplog.records


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_left_for_the_temporary_folder(write_folder, tmp_path, monkeypatch, code):
    folder, append = write_folder(), cache_module.NpyFile.append

    def full(file, values):
        if str(folder) in file._file.name:
            raise OSError(code, os.strerror(code))
        append(file, values)

    monkeypatch.setattr(cache_module.NpyFile, "append", full)
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert Dataset(folder).items.tolist()[:3] == [3, 1, 2]
    assert list((tmp_path / "elsewhere").rglob("items.npy"))
    assert not list((folder / ".cache").iterdir())
    folder = tmp_path  # no room anywhere
    with pytest.raises(OSError, match=r"must have room for the cache of a dataset: .*" + os.strerror(code)):
        Dataset(write_folder(header={"num_items": 8}))


@pytest.mark.parametrize("name", ["histories.parquet", "tasks/vip.parquet", "items.parquet"])
def test_a_folder_of_parts_is_named(write_folder, name):
    folder = write_folder(task=VIP, rows=ROWS)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

    def use():
        dataset = Dataset(folder)
        dataset.task("vip")
        dataset.item_ids_sha256(1)

    with pytest.raises(FileNotFoundError, match=rf"{name} must be one Parquet file, it is a folder: write its parts"):
        use()


def test_a_table_that_is_named_as_no_task_can_be_is_named_with_its_path(write_folder):
    folder = write_folder(task=VIP, rows=ROWS)
    pq.write_table(pa.table(ROWS), folder / "tasks" / "long (copy).parquet")
    with pytest.raises(ValueError, match=r"tasks/long \(copy\).parquet is named as no task can be: .*; rename it or"):
        Dataset(folder).task("vip")


@pytest.mark.parametrize(("file", "column"), [("histories", "fold"), ("histories", "times"), ("tasks/vip", "time")])
def test_a_column_that_is_there_twice_is_named(write_folder, file, column):
    path = write_folder(task=VIP, rows=ROWS) / f"{file}.parquet"
    table = pq.read_table(path)
    for _ in range(2 - table.column_names.count(column)):
        table = table.append_column(column, table[0])
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=rf"{file}.parquet must have one column '{column}', it has 2"):
        Dataset(path.parents[file.count("/")]).task("vip")


def test_a_byte_order_mark_is_no_damage(write_folder):
    folder = write_folder(task=VIP, rows=ROWS)
    for path in (folder / "dataset.json", folder / "tasks" / "vip.json"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert np.array_equal(Dataset(folder).task("vip").target, [1, 0])
