"""Processes that build at the same place: none sweeps what another is about to use, and one builds for all."""

import fcntl
import multiprocessing
import os
import tempfile
import time

import pytest

from pcl_ext.data import work_folder as module
from pcl_ext.data.cache import cached

MAKE, OPEN = tempfile.mkdtemp, os.open


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_folder_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch, when):
    made, held = [], []

    def make(**place):
        made.append(MAKE(**place))
        if when == "before it is opened" and len(made) == 1:
            module._remove_unlocked(tmp_path / made[0])
        return made[-1]

    def open_(path, *flags, **more):
        descriptor = OPEN(path, *flags, **more)
        if len(made) == 1 and str(path) == made[0] and not held:
            held.append(OPEN(path, os.O_RDONLY))
            if when == "before it is locked":
                module._remove_unlocked(tmp_path / made[0])
            elif when == "while it is locked":
                fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor

    monkeypatch.setattr(module.tempfile, "mkdtemp", make)
    monkeypatch.setattr(module.os, "open", open_)
    with module.work_folder(tmp_path, "work-") as folder:
        assert len(made) == 2
        (folder / "file").write_text("kept")
        with module.work_folder(tmp_path, "work-"):
            assert (folder / "file").read_text() == "kept"
    assert not folder.exists()
    for descriptor in held:
        os.close(descriptor)


def build_slowly(dataset, built):
    def build(folder):
        built.put(os.getpid())
        (folder / "a.npy").write_bytes(b"x" * 1000)
        time.sleep(0.3)

    assert (cached(dataset, "histories", "0" * 16, build) / "a.npy").stat().st_size == 1000


def test_of_many_processes_one_builds_a_cache(tmp_path):
    fork = multiprocessing.get_context("fork")
    built = fork.Queue()
    processes = [fork.Process(target=build_slowly, args=(tmp_path, built)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    built.get(timeout=60)
    assert built.empty()
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == [f"histories-{'0' * 16}"]


def test_a_build_that_fails_lets_the_next_one_begin(tmp_path):
    with pytest.raises(ValueError, match="damaged"):
        cached(tmp_path, "histories", "0" * 16, fail)
    assert list((tmp_path / ".cache").iterdir()) == []
    cached(tmp_path, "histories", "0" * 16, lambda folder: None)


def fail(folder):
    raise ValueError("damaged")
