"""Reading the Parquet files of a dataset in pieces; each mistake is named by file, rule, row and value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pcl_ext.data._arrow import pa, pc, pq
from pcl_ext.data.split import FOLDS

BATCH_ROWS = 1 << 15
LARGEST = 1e30  # of a float: a sum of many is still finite in float32


class Column:
    """One column of a Parquet file, checked while it is read. `file` and `name` go into the messages."""

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name

    def fail(self, rule: str, row: int, value) -> ValueError:
        return ValueError(f"{self.file}: {self.name} must be {rule}, got {value!r} in row {row}")

    def require(self, good: np.ndarray, rule: str, base: int, values) -> None:
        """Raise for the first row where `good` is False; `base` is the number of rows before this piece, `values` an
        array of numpy or Arrow."""
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            value = values[row]
            raise self.fail(rule, base + row, value.as_py() if isinstance(value, pa.Scalar) else value.item())

    def integers(self, array: pa.Array, base: int) -> np.ndarray:
        """[n] int64. Raises for nulls and other types."""
        if not pa.types.is_integer(array.type):
            raise ValueError(f"{self.file}: {self.name} must hold integers, got {array.type}")
        self._no_nulls(array, base)
        try:
            return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.file}: {self.name} must fit into int64, {error}") from error

    def floats(self, array: pa.Array, base: int) -> np.ndarray:
        """[n] float32. Raises for nulls, NaN, more than LARGEST in size, and other types."""
        if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type)):
            raise ValueError(f"{self.file}: {self.name} must hold numbers, got {array.type}")
        self._no_nulls(array, base)
        with np.errstate(over="ignore"):
            values = array.to_numpy(zero_copy_only=False).astype(np.float32)
        self.require(np.abs(values) <= LARGEST, f"a number of at most {LARGEST:g} in size", base, values)
        return values

    def folds(self, array: pa.Array, base: int) -> np.ndarray:
        """[n] uint8 positions in FOLDS."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            raise ValueError(f"{self.file}: {self.name} must hold strings, got {array.type}")
        found = pc.index_in(array.cast(pa.string()), value_set=pa.array(FOLDS)).fill_null(-1).to_numpy()
        self.require(found >= 0, "one of " + ", ".join(FOLDS), base, array)
        return found.astype(np.uint8)

    def lists(self, array: pa.Array, base: int) -> tuple[np.ndarray, np.ndarray]:
        """values [t] int64 and lengths [n] int64 of a list column. Raises for nulls and other types."""
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            raise ValueError(f"{self.file}: {self.name} must hold lists of integers, got {array.type}")
        self._no_nulls(array, base)
        lengths = pc.list_value_length(array).cast(pa.int64()).to_numpy(zero_copy_only=False)
        values = array.flatten()
        if values.null_count:
            at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise self.fail("without nulls", base + row_of(lengths, at), None)
        return self.integers(values, base), lengths

    def _no_nulls(self, array: pa.Array, base: int) -> None:
        if array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise self.fail("without nulls", base + row, None)


def row_of(lengths: np.ndarray, position: int) -> int:
    """Which list holds the flat position."""
    return int(np.searchsorted(np.cumsum(lengths), position, side="right"))


def require_file(path: Path) -> None:
    """Raise FileNotFoundError for what is no file."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} must be one Parquet file, it is a folder: write its parts into one file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")


def open_parquet(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> pq.ParquetFile:
    """Raises FileNotFoundError, or ValueError for a broken file and for columns that are missing or there twice."""
    require_file(path)
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    names = file.schema_arrow.names
    if missing := [name for name in required if name not in names]:
        raise ValueError(f"{path} must have the columns {', '.join(required)}; missing: {', '.join(missing)}")
    if twice := [name for name in (*required, *optional) if names.count(name) > 1]:
        raise ValueError(f"{path} must have one column {twice[0]!r}, it has {names.count(twice[0])}")
    return file


def pieces(file: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(rows before, record batch) over the whole file, in pieces of at most BATCH_ROWS rows."""
    base = 0
    try:
        for group in range(file.num_row_groups):  # one at a time: a reader of all of them keeps what it has read
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
                yield base, batch
                base += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read to its end (after row {base}): {error}") from error
