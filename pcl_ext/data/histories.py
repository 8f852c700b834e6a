"""histories.parquet -> flat arrays: streamed once into the cache, structure checked on the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pcl_ext.data.cache import NpyFolder, load
from pcl_ext.data.coded import give_back
from pcl_ext.data.parquet import Column, open_parquet, pieces, row_of
from pcl_ext.data.writer import check_recorded, file_sha256
from pcl_ext.progress import progress

FILE = "histories.parquet"


def build_histories(path: Path, num_items: int, recorded: str | None, out: Path) -> None:
    """Stream `path` into user_id, items, offsets, fold (and times, order) .npy files of the folder `out`.

    order.npy exists where the users are not sorted by id: the rows in the order of their ids.
    Raises ValueError naming file, rule, row and value.
    """
    file = open_parquet(path, ("user_id", "items", "fold"), ("times",))
    digest = file_sha256(path)
    check_recorded(path, recorded, digest)
    timed = "times" in file.schema_arrow.names
    columns = ["user_id", "items", "fold"] + ["times"] * timed
    dtypes = {"user_id": np.int64, "items": np.int32, "offsets": np.int64, "fold": np.uint8}
    if timed:
        dtypes["times"] = np.int64
    total, last, increasing = 0, None, True
    with NpyFolder(out, **dtypes) as arrays, progress(f"reading {path.name}", file.metadata.num_rows) as bar:
        arrays.append(offsets=np.zeros(1))
        for base, batch in pieces(file, path, columns):
            values = _read_piece(path, base, batch, num_items, timed)
            lengths = values.pop("lengths")
            arrays.append(**values, offsets=total + np.cumsum(lengths))
            total += int(lengths.sum())
            users = values["user_id"]
            if len(users):
                increasing &= bool((np.diff(users) > 0).all()) and (last is None or users[0] > last)
                last = users[-1]
            bar.update(batch.num_rows)
    give_back()
    if not increasing:
        _write_order(path, out)
    (out / "meta.json").write_text(json.dumps({"sha256": digest}))


def _read_piece(path: Path, base: int, batch, num_items: int, timed: bool) -> dict[str, np.ndarray]:
    users = Column(path, "user_id").integers(batch["user_id"], base)
    column = Column(path, "items")
    items, lengths = column.lists(batch["items"], base)
    if (bad := np.flatnonzero((items < 1) | (items > num_items))).size:
        at = int(bad[0])
        raise column.fail(f"item ids 1..{num_items}", base + row_of(lengths, at), int(items[at]))
    values = {"user_id": users, "items": items, "lengths": lengths}
    values["fold"] = Column(path, "fold").folds(batch["fold"], base)
    if timed:
        values["times"], counts = Column(path, "times").lists(batch["times"], base)
        Column(path, "times").require(counts == lengths, "as long as items", base, counts)
    return values


def _write_order(path: Path, out: Path) -> None:
    users = load(out, "user_id")
    order = np.argsort(users, kind="stable")
    same = np.flatnonzero(np.diff(users[order]) == 0)
    if same.size:
        first, second = order[same[0]], order[same[0] + 1]
        raise Column(path, "user_id").fail(f"unique (first in row {first})", int(second), int(users[second]))
    with NpyFolder(out, order=np.int64) as arrays:
        arrays.append(order=order)
