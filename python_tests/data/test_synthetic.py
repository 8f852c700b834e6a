import subprocess
import sys

import numpy as np
import pytest
import torch

from pcl_ext import baselines
from pcl_ext.data import Dataset, check, prepare_synthetic
from pcl_ext.metrics import higher_is_better

TASKS = ("click", "loyal", "range", "segment", "spend")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "data"
    prepare_synthetic(out)
    return Dataset(out)


def test_shape(dataset):
    assert (dataset.num_users, dataset.num_items, dataset.task_names) == (3000, 500, ("next", *TASKS))
    assert [dataset.task(name).spec.kind for name in TASKS] == ["binary", "binary", "items", "classes", "regression"]
    assert not np.isin(dataset.items, dataset.task("range").spec.catalogue).any()
    assert int(np.diff(dataset.offsets).min()) >= 2
    check(dataset)


def test_the_same_arguments_give_the_same_bytes(dataset, tmp_path):
    prepare_synthetic(tmp_path / "again")
    prepare_synthetic(tmp_path / "other", seed=1)
    assert Dataset(tmp_path / "again").sha256 == dataset.sha256
    assert Dataset(tmp_path / "other").sha256 != dataset.sha256


def test_users_do_not_depend_on_how_many_there_are(dataset, tmp_path):
    prepare_synthetic(tmp_path / "few", num_users=100)
    few = Dataset(tmp_path / "few")
    assert few.items.tolist() == dataset.items[: len(few.items)].tolist()
    assert few.task("spend").target.tolist() == dataset.task("spend").target[:100].tolist()


@pytest.mark.parametrize("task", ["next", *TASKS])
def test_trivial_is_beaten_by_cheap_and_cheap_by_the_oracle(dataset, task):
    torch.set_num_threads(1)  # matrices so small that threads wait for each other
    metric = dataset.task(task).spec.metric
    oracle = dataset.info["synthetic"]["oracle"][task][metric]
    trivial, cheap = (model(dataset, task)["metrics"][metric] for model in (baselines.trivial, baselines.cheap))
    sign = 1 if higher_is_better(metric) else -1
    assert sign * (cheap - trivial) > 0.04
    assert sign * (oracle - cheap) > 0.02


@pytest.mark.parametrize(("shared", "low", "high"), [(0.0, -0.05, 0.05), (1.0, 0.9, 1.0)])
def test_the_share_of_common_factors_is_what_it_says(tmp_path, shared, low, high):
    prepare_synthetic(tmp_path / "data", num_users=6000, shared=shared)
    dataset = Dataset(tmp_path / "data")
    claimed = dataset.info["synthetic"]["correlation"]["segment"]["spend"]
    assert low <= claimed <= high
    segment, spend = dataset.task("segment").target, dataset.task("spend").target
    measured = np.corrcoef(segment, spend)[0, 1]
    assert measured == pytest.approx(claimed * 0.80, abs=0.05)  # noise and classes take a fifth


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_users": 0}, "num_users must be an integer from 1 up, got 0"),
        ({"num_items": 10}, "num_items must be an integer from 50 up, got 10"),
        ({"mean_length": 2.5}, "mean_length must be an integer from 5 up, got 2.5"),
        ({"shared": 1.5}, "shared must be in 0..1, got 1.5"),
        ({"rotate": 7}, "rotate must be None or one of 0..4, got 7"),
    ],
    ids=str,
)
def test_nonsense_is_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match="must be") as error:
        prepare_synthetic(tmp_path / "out", **arguments)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


PEAK = """
import sys, tracemalloc
import pyarrow
from pcl_ext.data import prepare_synthetic
sys.modules["pcl_ext.data.check"]._EVENTS = 1 << 14
sys.modules["pcl_ext.data.synthetic"]._CHUNK = 1 << 12
tracemalloc.start()
for users in (10_000, 40_000):
    tracemalloc.reset_peak()
    prepare_synthetic(f"{sys.argv[1]}/{users}", num_users=users, mean_length=5)
    print(tracemalloc.get_traced_memory()[1], pyarrow.default_memory_pool().max_memory())
"""


def test_memory_does_not_grow_with_the_users(tmp_path):
    """Writing, reading into the cache and checking: the peak of numpy and of arrow."""
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    peaks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    few, few_arrow, many, many_arrow = map(int, peaks)
    assert many < 1.1 * few
    assert many_arrow < few_arrow + (1 << 18)
