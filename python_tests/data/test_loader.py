import numpy as np
import pytest
import torch

from pcl_ext.data import Dataset, DatasetWriter, iterate, plan
from pcl_ext.task import TaskSpec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """200 users with 0..60 events; every item id tells its user and place, so that batches can be checked exactly."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 61, 200)
    offsets = np.r_[0, np.cumsum(lengths)]
    out = tmp_path_factory.mktemp("loader") / "data"
    with DatasetWriter(out, "loader", int(offsets[-1]) + 1) as writer:
        writer.histories(np.arange(200), np.arange(1, offsets[-1] + 1), offsets, rng.integers(0, 3, 200))
        user = rng.integers(0, 200, 500)
        cut = (lengths[user] * rng.random(500)).astype(int)
        writer.task(TaskSpec("toy", "items", repeats=True), user, rng.integers(1, 50, 500), cut)
    return Dataset(out)


@pytest.mark.parametrize("max_len", [1, 7, 1000])
@pytest.mark.parametrize("name", ["toy", "next"])
def test_every_example_once_with_its_visible_history_and_targets(dataset, name, max_len):
    examples = dataset.examples(name, "train")
    seen = []
    for batch in iterate(dataset, examples, max_tokens=100, max_len=max_len, seed=1):
        history = batch.history
        assert len(history) == len(batch.index)
        assert len(history.items) <= max(100, max_len)
        for row, position in enumerate(batch.index.tolist()):
            user, cut = int(examples.user[position]), int(examples.cut[position])
            begin = dataset.offsets[user]
            want = dataset.items[begin : begin + cut].tolist()
            assert history.items[history.offsets[row] : history.offsets[row + 1]].tolist() == want[-max_len:]
            older = history.older
            before = [] if older is None else older.items[older.offsets[row] : older.offsets[row + 1]].tolist()
            assert before == want[:-max_len]
            low, high = examples.target_offsets[position : position + 2].tolist()
            assert batch.target[batch.target_row == row].tolist() == examples.target[low:high].tolist()
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(len(examples)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def flat(batch):
    return [batch.history.items, batch.history.offsets, batch.target, batch.target_row, batch.index]


def test_resuming_gives_the_same_batches(dataset):
    examples = dataset.examples("toy", None)
    settings = {"max_tokens": 200, "max_len": 20, "seed": 3}
    whole = list(iterate(dataset, examples, **settings))
    assert len(whole) == len(plan(examples, **settings)) > 4
    for start in (0, 1, 3, len(whole)):
        rest = list(iterate(dataset, examples, **settings, start=start))
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_seeds_shuffle_and_none_is_fixed(dataset):
    examples = dataset.examples("toy", None)

    def order(seed):
        return [rows.tolist() for rows in plan(examples, max_tokens=200, max_len=20, seed=seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(None) == order(None)


def test_pretraining_batches_have_no_targets(dataset):
    batches = list(iterate(dataset, dataset.sequences("train", 10), max_tokens=64, max_len=10, seed=0))
    assert sum(len(b.target) for b in batches) == 0
    assert all(int(b.history.lengths.min()) > 1 for b in batches)
