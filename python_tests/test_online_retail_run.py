"""Real purchases from end to end, default settings: every task is learned, none forgotten. Needs the data."""

from pathlib import Path

import pytest

from pcl_ext import run, store
from pcl_ext.data import Dataset, prepare_online_retail
from pcl_ext.metrics import ResultMatrix

SOURCE = Path(__file__).resolve().parents[2] / "shared" / "data" / "online-retail"
TASKS = ["range_b", "returned", "repurchase", "wholesale", "uk", "basket"]


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE.is_dir(), reason=f"needs the online-retail files in {SOURCE}")
def test_every_task_is_three_standard_errors_above_trivial_and_none_is_forgotten(tmp_path):
    prepare_online_retail(SOURCE, tmp_path / "data")
    dataset, folder = Dataset(tmp_path / "data"), tmp_path / "run"
    run.pretrain(dataset, folder)
    for task in TASKS:
        run.learn(folder, dataset, task)
    record = store.read_manifest(folder)["record"]
    matrix = ResultMatrix.from_json(record["matrix"])
    for task in ["next", *TASKS]:
        metric = matrix.metric[task]
        trivial = record["references"][task]["trivial"]["metrics"][metric]
        assert matrix.value(-1, task) - 3 * record["standard_error"][task][metric] > trivial, task
    assert matrix.forgetting()["worst"] == 0
    assert set(run.verify_unchanged(folder)["tasks"].values()) == {"equal"}
