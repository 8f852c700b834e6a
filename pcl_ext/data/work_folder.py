"""A folder to build something in, beside the place it will be renamed to."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder parent/<prefix>..., removed at the end unless it was renamed.

    It is locked while in use: folders of the same prefix that nobody holds a lock on were left by a killed process and
    are swept first.
    """
    for left in parent.glob(f"{prefix}*"):
        _remove_unlocked(left)
    folder, lock = _new_locked(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock. Before it is locked another process may take it for a
    leftover and sweep it: then there is another."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError, BlockingIOError):
            return folder, _lock(folder)


def _lock(folder: Path) -> int:
    """The descriptor that holds the folder's lock. BlockingIOError where another process holds it, FileNotFoundError
    where one has swept it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # it may have gone after it was opened
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync(folder: Path) -> None:
    """Every file and folder below `folder` is on the disk when this returns."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_one(path)
    sync_one(folder)


def sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unlocked(folder: Path) -> None:
    try:
        descriptor = _lock(folder)
    except OSError:
        return  # in use, gone already, or not ours
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
