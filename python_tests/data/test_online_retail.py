"""The tasks of docs on real purchases: sizes and reference numbers are known."""

from pathlib import Path

import numpy as np
import pytest

from pcl_ext import baselines
from pcl_ext.data import Dataset, iterate, prepare_events, prepare_online_retail

SOURCE = Path(__file__).parents[3] / "shared" / "data" / "online-retail"
pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason=f"needs the purchases in {SOURCE}")
TASKS = ("basket", "range_b", "repurchase", "returned", "uk", "wholesale")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("retail") / "data"
    prepare_online_retail(SOURCE, out)
    return Dataset(out)


def test_sizes(dataset):
    assert dataset.num_users == 3198
    assert dataset.users_by_fold["test"] == 507
    assert set(dataset.task_names) == {"next", *TASKS}
    assert len(dataset.task("range_b").spec.catalogue) == 730
    assert not np.isin(dataset.items, dataset.task("range_b").spec.catalogue).any()
    assert dataset.task("returned").spec.repeats
    assert int(np.diff(dataset.offsets).min()) == 3


REFERENCE = {  # evaluation.md: trivial model, cheap model; test users
    "next": ({"mrr@5": 0.018, "hr@10": 0.053}, {"mrr@5": 0.153, "hr@10": 0.286}),
    "range_b": ({"mrr@5": 0.027, "hr@10": 0.097}, {"mrr@5": 0.071, "hr@10": 0.205}),
    "returned": ({"mrr@5": 0.019, "hr@10": 0.051}, {"mrr@5": 0.032, "hr@10": 0.088}),
    "repurchase": ({"auc": 0.5, "accuracy": 0.570}, {"auc": 0.650, "accuracy": 0.613}),
    "wholesale": ({"auc": 0.5, "accuracy": 0.679}, {"auc": 0.826, "accuracy": 0.785}),
    "uk": ({"auc": 0.5, "accuracy": 0.892}, {"auc": 0.865, "accuracy": 0.927}),
    "basket": ({"accuracy": 0.331}, {"accuracy": 0.501}),
}


@pytest.mark.parametrize("task", REFERENCE)
def test_reference_numbers(dataset, task):
    trivial, cheap = REFERENCE[task]
    exact = 0.003 if task == "next" else 0.0006
    got = baselines.trivial(dataset, task)["metrics"]
    assert {key: got[key] for key in trivial} == pytest.approx(trivial, abs=exact)
    got = baselines.cheap(dataset, task)["metrics"]
    assert {key: got[key] for key in cheap} == pytest.approx(cheap, abs=0.022)  # one standard error on 507 users


def test_a_rotation_tests_other_users(dataset, tmp_path):
    prepare_online_retail(SOURCE, tmp_path / "rotated", rotate=1)
    rotated = Dataset(tmp_path / "rotated")
    assert rotated.items.tolist() == dataset.items.tolist()
    assert 550 < rotated.users_by_fold["test"] < 700
    assert rotated.sha256 != dataset.sha256


def test_batches_of_the_real_data(dataset):
    examples = dataset.examples("range_b", "test")
    targets = 0
    for batch in iterate(dataset, examples, max_tokens=4096, max_len=200, seed=None):
        targets += len(batch.target)
        assert batch.history.max_seqlen <= 200
    assert (len(examples), targets) == (482, 4999)


TOML = """
name = "online-retail"

[events]
file = "{folder}/interactions.parquet"
time = "timestamp"
where = [["behaviour", "==", 1], ["is_product", "==", true]]
distinct = true
min_length = 3
until = 2011-09-10

[users]
file = "{folder}/users.parquet"

[items]
file = "{folder}/items.parquet"

[[task]]
name = "range_b"
kind = "items"
source = "events"
where = [["behaviour", "==", 1], ["is_product", "==", true]]
until = 2011-09-10
items = {{ modulo = 5, where = [["is_product", "==", true]] }}

[[task]]
name = "returned"
kind = "items"
source = "events"
where = [["behaviour", "==", 2], ["is_product", "==", true]]
repeats = true

[[task]]
name = "repurchase"
kind = "binary"
source = "events"
where = [["behaviour", "==", 1], ["is_product", "==", true]]
from = 2011-09-10
until = 2011-12-10

[[task]]
name = "wholesale"
kind = "binary"
source = "events"
where = [["behaviour", "==", 1], ["is_product", "==", true]]
until = 2011-09-10
column = "quantity"
reduce = "median"
threshold = 12

[[task]]
name = "uk"
kind = "binary"
column = "country"
positive = "United Kingdom"
"""


def test_the_same_tables_from_a_toml_file(dataset, tmp_path):
    (tmp_path / "retail.toml").write_text(TOML.format(folder=SOURCE))
    prepare_events(tmp_path / "retail.toml", tmp_path / "out")
    other = Dataset(tmp_path / "out")
    assert np.array_equal(other.items, dataset.items)
    assert np.array_equal(other.fold, dataset.fold)
    for name in ("range_b", "returned", "repurchase", "wholesale", "uk"):
        for column in ("user", "cut", "target"):
            assert np.array_equal(getattr(other.task(name), column), getattr(dataset.task(name), column)), name


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="interactions.parquet is missing"):
        prepare_online_retail(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
