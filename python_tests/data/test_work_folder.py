"""Two processes that build at the same place: neither sweeps what the other is about to use."""

import fcntl
import os
import tempfile

import pytest

from pcl_ext.data import work_folder as module

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
