"""items.parquet: what the source of a dataset calls its items 1..V."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from pcl_ext.data._arrow import pa, pc
from pcl_ext.data.parquet import open_parquet

FILE = "items.parquet"
_ROWS = 1 << 20


def read_items(path: Path) -> tuple[np.ndarray, pa.Array] | None:
    """item_id [n] int64, rising, and original_id: n texts (numbers as such). None for a table without original_id.

    Raises FileNotFoundError, or ValueError naming the file, where it is no such table.
    """
    file = open_parquet(path, ("item_id",), ("original_id",))
    if "original_id" not in file.schema_arrow.names:
        return None
    try:
        table = file.read(["item_id", "original_id"]).combine_chunks()
        ids = table["item_id"].cast(pa.int64()).to_numpy()
        originals = table["original_id"].cast(pa.large_string()).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: item_id must hold integers, original_id integers or text: {error}") from error
    if table["item_id"].null_count or originals.null_count:
        raise ValueError(f"{path}: item_id and original_id must hold no nulls")
    order = np.argsort(ids, kind="stable")
    return ids[order], originals.take(pa.array(order))


def earlier_items(path: Path) -> pa.Array:
    """original_id of the items 1..V of an earlier dataset, in this order: V texts. Raises as `read_items` does, and
    ValueError where the table does not name each of them once."""
    table = read_items(path)
    if table is None or (table[0] != np.arange(1, len(table[0]) + 1)).any() or len(pc.unique(table[1])) < len(table[1]):
        raise ValueError(f"{path} must name the items 1..V of a dataset, each once, by an original_id of its own")
    return table[1]


def item_ids_sha256(path: Path, count: int) -> str | None:
    """sha256 over the original ids of items 1..count, each with its item id and the bytes of its text (utf-8), which
    numbers have too. None where the file is missing or has no column original_id."""
    table = read_items(path) if path.exists() else None
    if table is None:
        return None
    ids, originals = table
    digest = sha256()
    for start in range(0, int(np.searchsorted(ids, count, "right")), _ROWS):
        end = min(start + _ROWS, int(np.searchsorted(ids, count, "right")))
        texts = originals[start:end]
        sizes = pc.binary_length(texts).to_numpy().astype("<i8")
        digest.update(ids[start:end].astype("<i8").tobytes() + sizes.tobytes() + "".join(texts.to_pylist()).encode())
    return digest.hexdigest()
