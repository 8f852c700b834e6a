"""How much memory `prepare events` takes for each event of a log."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from pcl_ext.data import prepare_events, tablefile

EVENTS, USERS, ITEMS = 200_000, 2_000, 500
TOML = 'name = "shop"\n[events]\nfile = "log"\ntime = "time"\n'


def peak_of(call) -> int:
    """Bytes: the peak of what Python and NumPy hold, and that of what Arrow holds."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


@pytest.mark.parametrize(
    ("kind", "text", "most"), [("parquet", False, 95), ("parquet", True, 95), ("csv", False, 95), ("csv", True, 130)]
)
def test_a_log_takes_few_bytes_an_event(kind, text, most, tmp_path, monkeypatch):
    """The blocks of a CSV that are read ahead count much in so short a log."""
    monkeypatch.setattr(tablefile, "_BLOCK", 1 << 17)
    rng = np.random.default_rng(0)
    user, item = pa.array(rng.integers(0, USERS, EVENTS)), pa.array(rng.integers(0, ITEMS, EVENTS))
    if text:
        user = pa.array([f"user-{i:06d}" for i in range(USERS)]).take(user)
        item = pa.array([f"item-{i:06d}" for i in range(ITEMS)]).take(item)
    table = pa.table({"user_id": user, "item_id": item, "time": rng.integers(0, 10**8, EVENTS)})
    if kind == "csv":
        csv.write_csv(table, tmp_path / "log.csv")
    else:
        pq.write_table(table, tmp_path / "log.parquet", row_group_size=20_000)
    (tmp_path / "shop.toml").write_text(TOML.replace('"log"', f'"log.{kind}"'))
    peak = peak_of(lambda: prepare_events(tmp_path / "shop.toml", tmp_path / "out"))
    assert peak < most * EVENTS, f"{peak / EVENTS:.0f} bytes an event"
