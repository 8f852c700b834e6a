"""Small dataset folders, written by hand or by the writer."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop_log import LOG, USERS

from pcl_ext.data import Dataset, DatasetWriter, prepare_events
from pcl_ext.task import TaskSpec

HISTORIES = [[3, 1, 2], [5, 4], [], [7, 1, 2, 3, 4, 5], [6]]
FOLDS = ["train", "valid", "test", "test", "train"]


@pytest.fixture
def write_folder(tmp_path):
    """A dataset folder as other tools would write it; keywords replace columns and header values."""

    def write(header=None, task=None, rows=None, **columns):
        folder = tmp_path / "plain"
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        values = {"format": 1, "name": "plain", "num_items": 7} | (header or {})
        (folder / "dataset.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        table = {
            "user_id": pa.array([10, 11, 12, 13, 14], pa.int64()),
            "items": pa.array(HISTORIES, pa.list_(pa.int32())),
            "fold": pa.array(FOLDS),
        } | columns
        pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), folder / "histories.parquet")
        if task is not None:
            (folder / "tasks" / f"{task.get('name', 'toy')}.json").write_text(json.dumps(task))
            pq.write_table(pa.table(rows), folder / "tasks" / f"{task.get('name', 'toy')}.parquet")
        return folder

    return write


@pytest.fixture
def toy(tmp_path):
    """Five users, seven items, an items task with two targets of user 13, and a regression."""
    with DatasetWriter(tmp_path / "toy", "toy", 7) as writer:
        lengths = [len(items) for items in HISTORIES]
        offsets = np.r_[0, np.cumsum(lengths)]
        fold = [("train", "valid", "test").index(name) for name in FOLDS]
        writer.histories([10, 11, 12, 13, 14], sum(HISTORIES, []), offsets, fold, np.arange(sum(lengths)))
        writer.task(TaskSpec("more", "items", catalogue=(6, 7)), [13, 10, 13, 13], [6, 7, 6, 6], [3, 3, 3, 6])
        writer.task(TaskSpec("value", "regression"), [14, 10], [0.5, -1.0], [1, 3])
    return Dataset(tmp_path / "toy")


@pytest.fixture
def prepare(tmp_path):
    """Write log.csv, users.csv and the TOML; prepare; return the dataset."""

    def run(toml, log=LOG, users=USERS, **arguments):
        (tmp_path / "log.csv").write_text(log)
        (tmp_path / "users.csv").write_text(users)
        (tmp_path / "shop.toml").write_text(toml)
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        prepare_events(tmp_path / "shop.toml", out, **arguments)
        return Dataset(out)

    return run
