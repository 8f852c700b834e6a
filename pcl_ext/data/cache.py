"""Parquet once, flat .npy files from then on: written in pieces, complete or absent, memory-mapped after."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np

from pcl_ext.data.work_folder import sync, work_folder

_VERSION = 2
_HEADER = 128
_SIZES = "sizes.json"  # the size of every file of a cache folder, written last


class NpyFile:
    """A one-dimensional .npy file that grows: a header of fixed size is filled in by `close`."""

    def __init__(self, path: Path, dtype):
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._file = open(path, "wb")
        self._file.write(b"\0" * _HEADER)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.count += len(values)

    def close(self) -> None:
        text = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': ({self.count},), }}"
        start = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(start + text.encode().ljust(_HEADER - 11) + b"\n")
        self._file.close()


class NpyFolder:
    """Growing .npy files of one folder by name; close all at the end of a `with`."""

    def __init__(self, folder: Path, **dtypes):
        self.files = {name: NpyFile(folder / f"{name}.npy", dtype) for name, dtype in dtypes.items()}

    def append(self, **values: np.ndarray) -> None:
        for name, array in values.items():
            self.files[name].append(array)

    def __enter__(self) -> NpyFolder:
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files.values():
            file.close()


def load(folder: Path, name: str) -> np.ndarray | None:
    """The memory-mapped array `name` of a cache folder; None where there is none. Read-only."""
    path = folder / f"{name}.npy"
    if not path.exists():
        return None
    if path.stat().st_size <= _HEADER:  # an empty file cannot be mapped
        return np.load(path)
    return np.load(path, mmap_mode="r")


def release(array: np.ndarray) -> None:
    """Give the pages of a memory-mapped array back: what has been read counts as memory in use until then."""
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def identity(paths: Sequence[Path], extra: str = "") -> str:
    """Changes when one of the files does: another file, size or time, and what else decides the cache's contents. The
    time of the last change counts too: a copy may bring its time of modification along."""
    stats = [(path.name, path.stat()) for path in paths]
    marks = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return sha256(repr((_VERSION, marks, extra)).encode()).hexdigest()[:16]


def cached(dataset: Path, stem: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder that `build` once filled for this key: <dataset>/.cache/<stem>-<key>, or below the temporary folder
    where that cannot be read or written, or has no room. Built apart and renamed; one that has lost a file, or a part
    of it, is built again. Only the user who made it can read it: it may hold more than the modes of the dataset's files
    show others."""
    try:
        return _find_or_build(dataset / ".cache", f"{stem}-{key}", build)
    except _NotWritable:
        return _find_or_build(_user_cache(dataset), f"{stem}-{key}", build)


class _NotWritable(OSError):
    """Files cannot be made in a cache's root, or there is no room for them."""


def _find_or_build(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    if _is_whole(root / name):
        return root / name
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise _NotWritable(f"{root} must be a folder that can be written: {error}") from error
    try:
        with _alone(root / f"{name}.lock"):
            return root / name if _is_whole(root / name) else _build(root / name, build)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _NotWritable(f"{root} must have room for the cache of a dataset: {error}") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Of many processes that open a new dataset at once, one builds and the others wait for it. Where the file system
    has no locks each builds, and the first is taken."""
    with lock.open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits for it yet finds what was built


def _is_whole(folder: Path) -> bool:
    """Whether the folder is there, may be read, and has every file at its size."""
    try:
        sizes = json.loads((folder / _SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _build(final: Path, build: Callable[[Path], None]) -> Path:
    with work_folder(final.parent, f"tmp-{final.name}-") as work:
        build(work)
        (work / _SIZES).write_text(json.dumps({path.name: path.stat().st_size for path in sorted(work.iterdir())}))
        sync(work)
        if not _is_whole(final):
            shutil.rmtree(final, ignore_errors=True)
        try:
            os.rename(work, final)
        except OSError:
            if not _is_whole(final):  # another process was first otherwise
                raise
    for old in final.parent.glob(f"{final.name.rsplit('-', 1)[0]}-{'[0-9a-f]' * 16}"):
        if old != final:  # of an earlier version of the file; open memory maps stay valid
            shutil.rmtree(old, ignore_errors=True)
    return final


def _user_cache(dataset: Path) -> Path:
    name = sha256(str(dataset).encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"pcl_ext-cache-{os.geteuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.geteuid():
        raise PermissionError(f"{root} must be a folder of this user, it belongs to someone else")
    return root / name
