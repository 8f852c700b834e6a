"""What is kept of a dataset beside it: read again when its files change, whole or not at all."""

import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from packed_lists import HISTORIES, histories

from pcl_ext.data import Dataset
from pcl_ext.data import cache as cache_module


def test_cache_is_mapped_reused_and_follows_the_file(write_folder):
    folder = write_folder()
    assert isinstance(Dataset(folder).items, np.memmap)
    made = sorted(p.stat().st_mtime_ns for p in (folder / ".cache").rglob("*.npy"))
    Dataset(folder)
    assert sorted(p.stat().st_mtime_ns for p in (folder / ".cache").rglob("*.npy")) == made
    write_folder(items=pa.array([[1]] * 5, pa.list_(pa.int32())))
    os.utime(folder / "histories.parquet", ns=(1, 1))
    assert histories(Dataset(folder)) == [[1]] * 5
    assert len(list((folder / ".cache").glob("histories-*"))) == 1


def test_a_dataset_that_cannot_be_written_is_cached_elsewhere(write_folder, tmp_path, monkeypatch):
    folder = write_folder()
    (folder / ".cache").write_text("in the way")  # root writes everywhere, but not below a file
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert histories(Dataset(folder)) == HISTORIES
    assert list((tmp_path / "elsewhere").rglob("items.npy"))


def open_as_another_user(folder, temporary, answer):
    """In a child: `folder` is opened by a user who may not read its cache."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    cache_module.tempfile.tempdir = str(temporary)
    answer.put(histories(Dataset(folder)))


def test_a_cache_of_another_user_is_left_alone(write_folder):
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as shared:  # pytest's folders are closed to others
        folder, temporary = shutil.copytree(write_folder(), f"{shared}/plain"), Path(shared, "tmp")
        Dataset(folder)
        temporary.mkdir()
        for path, mode in ((Path(shared), 0o755), (temporary, 0o777), (Path(folder, ".cache"), 0)):
            path.chmod(mode)
        answer = context.Queue()
        process = context.Process(target=open_as_another_user, args=(folder, temporary, answer))
        process.start()
        process.join()
        Path(folder, ".cache").chmod(0o700)
        assert process.exitcode == 0
        assert answer.get() == HISTORIES


@pytest.mark.parametrize("damage", ["gone", "empty", "header"])
@pytest.mark.parametrize("name", ["items.npy", "offsets.npy", "times.npy", "meta.json", "sizes.json"])
def test_a_cache_that_lost_a_part_is_built_again(toy, name, damage):
    file = next((toy.path / ".cache").glob("histories-*")) / name
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, {"empty": 0, "header": min(128, file.stat().st_size - 2)}[damage])
    again = Dataset(toy.path)
    assert histories(again) == HISTORIES
    assert again.times.tolist() == list(range(12))
    assert len(list((toy.path / ".cache").iterdir())) == 1


def test_a_killed_build_of_the_cache_is_swept(write_folder):
    folder = write_folder()
    Dataset(folder)
    (cache,) = (folder / ".cache").glob("histories-*")
    left = cache.with_name(f"tmp-{cache.name}-abc")
    cache.rename(left)
    (left / "items.npy").write_bytes(b"half")
    assert histories(Dataset(folder)) == HISTORIES
    assert not left.exists()
