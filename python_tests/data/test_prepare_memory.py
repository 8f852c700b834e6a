"""How much memory `prepare events` takes for each event of a log."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pcl_ext.data import prepare_events

EVENTS, USERS, ITEMS = 200_000, 2_000, 500
TOML = 'name = "shop"\n[events]\nfile = "log.parquet"\ntime = "time"\n'


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


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
def test_a_log_takes_few_bytes_an_event(text, tmp_path):
    rng = np.random.default_rng(0)
    user, item = pa.array(rng.integers(0, USERS, EVENTS)), pa.array(rng.integers(0, ITEMS, EVENTS))
    if text:
        user = pa.array([f"user-{i:06d}" for i in range(USERS)]).take(user)
        item = pa.array([f"item-{i:06d}" for i in range(ITEMS)]).take(item)
    table = pa.table({"user_id": user, "item_id": item, "time": rng.integers(0, 10**8, EVENTS)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=20_000)
    (tmp_path / "shop.toml").write_text(TOML)
    peak = peak_of(lambda: prepare_events(tmp_path / "shop.toml", tmp_path / "out"))
    assert peak < 95 * EVENTS, f"{peak / EVENTS:.0f} bytes an event"
