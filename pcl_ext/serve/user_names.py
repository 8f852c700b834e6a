"""What the log that a dataset was made from calls its users."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pcl_ext.data import Dataset
from pcl_ext.data._arrow import pa
from pcl_ext.data.cache import cached, identity
from pcl_ext.data.parquet import open_parquet

FILE = "users.parquet"
_NAME = "original_id"
_ROWS = 1 << 16  # of a batch


def has_names(dataset: Dataset) -> bool:
    """Whether the dataset has a users.parquet with the column original_id. ValueError where it has a broken one."""
    path = dataset.path / FILE
    return path.exists() and _NAME in open_parquet(path, ("user_id",), (_NAME,)).schema_arrow.names


class UserNames:
    """original_id of a dataset's users.parquet by row of the dataset, on the disk in its cache: memory does not depend
    on the number of users but for about 100 bytes a user, once. Raises ValueError for a file that is no such table."""

    def __init__(self, dataset: Dataset):
        key = identity([dataset.path / FILE], dataset.key)
        self.path = cached(dataset.path, "users", key, lambda out: _build(dataset, out)) / f"{_NAME}.arrow"

    def of(self, rows: range) -> pa.ChunkedArray:
        """Of these rows; null for a user that the file does not name."""
        with pa.memory_map(str(self.path)) as source:
            column = pa.ipc.open_file(source).read_all()[_NAME].slice(rows.start, len(rows))
            return column.take(pa.array(np.arange(len(rows))))  # a copy: the pages are let go


def _build(dataset: Dataset, out: Path) -> None:
    path = dataset.path / FILE
    dataset.check_recorded(path)
    try:
        table = open_parquet(path, ("user_id", _NAME)).read(["user_id", _NAME])
        users, names = table["user_id"].cast(pa.int64()).to_numpy(), table[_NAME].cast(pa.large_string())
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: user_id must hold integers, {_NAME} integers or text: {error}") from error
    row = dataset.rows_of(users)
    place = np.full(dataset.num_users, -1)
    place[row[row >= 0]] = np.flatnonzero(row >= 0)
    if (place >= 0).sum() < (row >= 0).sum():
        raise ValueError(f"{path}: user_id must name every user once, got one twice")
    schema = pa.schema([(_NAME, pa.string())])
    with pa.OSFile(str(out / f"{_NAME}.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(place), _ROWS):
            part = place[start : start + _ROWS]
            column = names.take(pa.array(part, mask=part < 0)).cast(pa.string()).combine_chunks()
            writer.write_batch(pa.record_batch([column], schema=schema))
