"""Files that are there whole or not at all, and locks between processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

MEND = "restore the file from a copy of the run, or make it again"
_TEMPORARY = re.compile(r"\.pcl-[0-9a-f]{16}\.tmp")


class StoreError(ValueError):
    """A file is missing, damaged, or not what belongs there; or what was to be saved must not be."""


def damaged(path: Path, what: str, *, mend: str = MEND) -> StoreError:
    return StoreError(f"{path} {what}; {mend}")


@contextmanager
def temporary(folder: Path) -> Iterator[BinaryIO]:
    """A new file in `folder` under a name of our own, locked while it is in use, gone afterwards unless renamed."""
    with _new_locked(folder) as file:
        try:
            yield file
        except OSError as error:  # that of a full disk names no file: say which disk
            if error.errno is not None and error.filename is None:
                error.filename = str(folder)
            raise
        finally:
            Path(file.name).unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one of `temporary`."""
    return _TEMPORARY.fullmatch(name) is not None


def _new_locked(folder: Path) -> BinaryIO:
    """A new file that this process holds. Before it is locked another process may take it for a leftover and sweep it:
    then there is another."""
    while True:
        draft = folder / f".pcl-{secrets.token_hex(8)}.tmp"
        file = draft.open("xb")
        if _try_lock(file) and draft.exists():
            return file
        file.close()


def write_file(path: Path, *pieces: bytes | np.ndarray) -> None:
    """`path` holds the old or the new content, never a mix."""
    with whole(path, path.parent) as file:
        file.writelines(pieces)


@contextmanager
def whole(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """What is written inside is `path` at the end, or nothing is: a temporary file in `folder`, fsync, rename, fsync of
    the folder."""
    with temporary(folder) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
        fsync(path.parent)


@contextmanager
def reading(path: Path, mend: str = MEND) -> Iterator[None]:
    """Inside, a regular file is read. StoreError where there is none; `mend` says what to do about one that is
    missing."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise damaged(path, "is not a regular file")
        yield
    except FileNotFoundError:
        raise damaged(path, "is missing", mend=mend) from None
    except PermissionError as error:
        raise damaged(path, f"cannot be read ({error})", mend="give this user permission to read it") from error
    except OSError as error:
        raise damaged(path, f"cannot be read ({error})") from error


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporary(folder: Path) -> None:
    """Remove what a killed save left in `folder`: files of our own naming that no process holds."""
    for path in folder.iterdir():
        if is_temporary(path.name) and path.is_file() and not path.is_symlink():
            with suppress(OSError), path.open("r+b") as file:  # network file systems lock what can be written only
                if _try_lock(file):
                    path.unlink()


def _try_lock(file: BinaryIO) -> bool:
    """Whether nobody else holds the file. The lock lives as long as `file` is open, and dies with the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: there nobody holds any.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _open_lock(path: Path) -> BinaryIO:
    """For reading and appending, made where it is missing; a link would empty the file that it points to."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.fdopen(os.open(path, flags, 0o666), "a+b")
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise StoreError(f"{path} must be a file, which is locked, not a link or a folder; remove it") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise StoreError(f"{path} must be a file, which is locked; remove it")
    return file


@contextmanager
def locked(path: Path, busy: str, advice: str) -> Iterator[None]:
    """Hold the lock file `path` of a folder, or raise StoreError: the folder is `busy`, by whom, and what to do."""
    with _open_lock(path) as file:
        if not _try_lock(file):
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
            raise StoreError(f"{path.parent} is {busy} by {holder}; {advice}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
        yield
