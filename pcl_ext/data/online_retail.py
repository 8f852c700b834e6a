"""`pcl prepare online-retail`: the UCI Online Retail purchases and six tasks about its customers.

The history is what a customer bought for the first time before 2011-09-10, without the items of range B: a fifth of
the items, by hash, that no input holds.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np

from pcl_ext.data._arrow import pa
from pcl_ext.data.config import TableConfig, parse_config
from pcl_ext.data.events import build
from pcl_ext.data.split import hash_modulo
from pcl_ext.data.tablefile import columns_of, read_table
from pcl_ext.data.writer import source as describe

CUT = dt.date(2011, 9, 10)
_PURCHASE = [["behaviour", "==", 1], ["is_product", "==", True]]
_RANGE_B = {"modulo": 5, "where": [["is_product", "==", True]]}
_TASKS = [
    {
        "name": "range_b",
        "kind": "items",
        "description": "which products of another range the customer buys",
        "source": "events",
        "where": _PURCHASE,
        "until": CUT,
        "items": _RANGE_B,
    },
    {
        "name": "returned",
        "kind": "items",
        "description": "which products the customer sends back",
        "source": "events",
        "where": [["behaviour", "==", 2], ["is_product", "==", True]],
        "repeats": True,
    },
    {
        "name": "repurchase",
        "kind": "binary",
        "description": "whether the customer buys again within three months",
        "source": "events",
        "where": _PURCHASE,
        "from": CUT,
        "until": dt.date(2011, 12, 10),
    },
    {
        "name": "wholesale",
        "kind": "binary",
        "description": "whether the customer buys in bulk: the median line is of twelve pieces or more",
        "source": "events",
        "where": _PURCHASE,
        "until": CUT,
        "reduce": "median",
        "column": "quantity",
        "threshold": 12,
    },
    {
        "name": "uk",
        "kind": "binary",
        "description": "whether the customer lives in the United Kingdom",
        "column": "country",
        "positive": "United Kingdom",
    },
    {
        "name": "basket",
        "kind": "classes",
        "description": "how much the customer spends at a time: low, middle or high third",
        "column": "basket_third",
        "labels": ["low", "middle", "high"],
    },
]
_CONFIG = {
    "name": "online-retail",
    "events": {
        "file": "interactions.parquet",
        "time": "timestamp",
        "where": _PURCHASE,
        "distinct": True,
        "min_length": 3,
        "until": CUT,
    },
    "users": {"file": "users.parquet"},
    "items": {"file": "items.parquet"},
    "task": _TASKS,
}


def prepare(folder: str | Path, out: str | Path, *, rotate: int | None = None) -> None:
    """`folder` holds interactions.parquet, users.parquet and items.parquet; `out` becomes a dataset.

    Raises FileNotFoundError and ValueError for missing files and columns.
    """
    folder = Path(folder)
    columns = {
        "interactions": {"user_id", "item_id", "timestamp", "behaviour", "quantity", "price_pence", "invoice"},
        "users": {"user_id", "country"},
        "items": {"item_id", "is_product"},
    }
    files = {name: TableConfig(f"{name}.parquet") for name in columns}
    events, users, items = (read_table(files[name], folder, name, columns[name], ()) for name in columns)
    config = parse_config(_CONFIG, folder)
    users = users.append_column("basket_third", _basket_thirds(events, users, items))
    sources = [describe(folder / file.file) for file in files.values()]
    build(config, out, columns_of(events), users, items, rotate=rotate, sources=sources)


def _basket_thirds(events: pa.Table, users: pa.Table, items: pa.Table) -> pa.Array:
    """low, middle or high per row of users: the third, among the customers with a history, of the mean value of an
    invoice's products before the cut; null for the others."""
    user, item, invoice = (events[name].to_numpy() for name in ("user_id", "item_id", "invoice"))
    product = np.isin(item, items["item_id"].to_numpy()[items["is_product"].to_numpy(zero_copy_only=False)])
    until = dt.datetime(CUT.year, CUT.month, CUT.day, tzinfo=dt.timezone.utc).timestamp()
    kept = product & (events["behaviour"].to_numpy() == 1) & (events["timestamp"].to_numpy() < until)
    value = events["quantity"].to_numpy()[kept].astype(np.float64) * events["price_pence"].to_numpy()[kept]
    buyers, code = np.unique(user[kept], return_inverse=True)
    invoices = np.unique(np.stack([code, invoice[kept]]), axis=1)[0]
    mean = np.bincount(code, weights=value) / np.bincount(invoices)
    with_history = _with_history(user[kept], item[kept])
    edges = np.quantile(mean[np.isin(buyers, with_history)], [1 / 3, 2 / 3])
    third = dict(zip(buyers.tolist(), np.searchsorted(edges, mean, side="right").tolist(), strict=True))
    names = ("low", "middle", "high")
    return pa.array([names[third[u]] if u in third else None for u in users["user_id"].to_pylist()], pa.string())


def _with_history(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Ids of the customers with at least three different items of range A."""
    distinct = np.unique(np.stack([user, item]), axis=1)
    items, code = np.unique(distinct[1], return_inverse=True)
    inputs = hash_modulo(_CONFIG["name"], "item", items, _RANGE_B["modulo"])[code] != 0
    buyers, counts = np.unique(distinct[0][inputs], return_counts=True)
    return buyers[counts >= 3]
