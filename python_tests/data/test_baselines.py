"""Baselines on data where the right answer is known."""

import numpy as np
import pytest
import torch

from pcl_ext import baselines
from pcl_ext.data import Dataset, DatasetWriter, Examples, fold_of
from pcl_ext.metrics import TaskMetrics
from pcl_ext.task import TaskSpec

USERS = 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two kinds of users; each walks in circles over its half of items 1..20 and likes its half of 21..24."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, USERS)
    start = rng.integers(0, 10, USERS)
    items = 1 + 10 * kind[:, None] + (start[:, None] + np.arange(6)) % 10
    out = tmp_path_factory.mktemp("baselines") / "data"
    user = np.arange(USERS)
    with DatasetWriter(out, "circles", 24) as writer:
        writer.histories(user, items.ravel(), np.arange(USERS + 1) * 6, fold_of("circles", user))
        cut = np.full(USERS, 6)
        likes = 21 + 2 * kind + rng.integers(0, 2, USERS)
        writer.task(TaskSpec("likes", "items", catalogue=(24, 23, 22, 21)), user, likes, cut)
        writer.task(TaskSpec("kind", "binary"), user, kind, cut)
        writer.task(TaskSpec("kinds", "classes", num_classes=3), user, 2 * kind, cut)
        writer.task(TaskSpec("value", "regression"), user, 5.0 + 100 * kind, cut)
    return Dataset(out)


TIES = {
    "few": [9, 9, 4, 4, 4, 0, 0],
    "none": list(range(40)),
    "at the lowest rank": [5, 4, 3, 3] + [2] * 15 + [1] * 9,
    "all": [3] * 30,
    "nobody": [0] * 30,
}


@pytest.mark.parametrize("counts", TIES.values(), ids=TIES)
def test_popularity_is_measured_as_a_row_of_scores_for_each_user_would_be(counts):
    scores = torch.tensor(counts).double()[torch.randperm(len(counts))]
    target = torch.arange(len(counts)).repeat(3)
    users = torch.arange(len(target) // 2 + 1)
    offsets = (2 * torch.arange(len(users) + 1)).clamp(max=len(target))
    examples, spec = Examples(users, users, offsets, target), TaskSpec("any", "items")
    rows = torch.repeat_interleave(users, offsets.diff())
    whole = TaskMetrics(spec)
    whole.update(scores.expand(len(users), -1), target, rows)
    assert baselines._measure_order(examples, spec, scores) == whole.compute()


def test_popularity_of_a_wide_catalogue_holds_no_row_of_scores(tmp_path):
    """A million items, 3,000 users: rows of scores would be 24 GB."""
    user, items = np.arange(3_000), np.random.default_rng(0).geometric(1e-4, 6_000).clip(max=1_000_000)
    with DatasetWriter(tmp_path / "data", "wide", 1_000_000) as writer:
        writer.histories(user, items, np.arange(3_001) * 2, fold_of("wide", user))
    seen, update = [], TaskMetrics.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskMetrics, "update", lambda self, *args: (seen.append(args[0].shape[1]), update(self, *args)))
        got = baselines.trivial(Dataset(tmp_path / "data"), "next")
    assert got["name"] == "popularity"
    assert 0 < max(seen) < 1000


def test_markov_knows_the_circle(dataset):
    got = baselines.cheap(dataset, "next")
    assert got["name"] == "Markov chain"
    assert got["metrics"]["mrr@5"] == 1


def test_neighbours_find_the_half_that_is_liked(dataset):
    assert baselines.trivial(dataset, "likes")["metrics"]["mrr@5"] < 0.65
    got = baselines.cheap(dataset, "likes")
    assert got["name"].startswith("nearest users (k = ")
    assert 0.7 < got["metrics"]["mrr@5"] < 0.8  # two equal items: 1 or 1/2


def test_labels_are_separable(dataset):
    assert baselines.trivial(dataset, "kind")["metrics"]["auc"] == 0.5
    assert baselines.cheap(dataset, "kind")["metrics"]["auc"] == 1
    assert baselines.cheap(dataset, "kinds")["metrics"]["accuracy"] == 1
    spread = dataset.task("value").target.std()
    assert baselines.trivial(dataset, "value")["metrics"]["rmse"] == pytest.approx(spread, rel=0.05)
    assert baselines.cheap(dataset, "value")["metrics"]["rmse"] < 0.1 * spread


@pytest.mark.parametrize("task", ["kind", "value"])
def test_a_regression_on_a_large_catalogue_fits_the_items_of_its_users_alone(dataset, task, monkeypatch):
    """As if all items had a weight, which those that none of its users has keep at 0: items 21 to 24 are in no history,
    and four users do not have all of the others."""
    monkeypatch.setattr(baselines, "_MOST_REGRESSION", 4)
    spec, test = dataset.task(task).spec, dataset.examples(task, "test")
    train, models = baselines._some(dataset.examples(task, "train"), 4), []
    target = train.target.double()
    for most in (24, 23):
        monkeypatch.setattr(baselines, "_MOST_WEIGHTS", most)
        model = baselines.BagOfItems(dataset, spec)
        model.weight = [torch.zeros_like(weight, dtype=torch.float64) for weight in model.weight]
        model._fit(model._places(train), torch.arange(4), (target - model.mean) / model.scale, 0.01)
        models.append(model)
    whole, part = models
    held = baselines._sets(dataset, train)[0].unique()
    assert len(part.weight[0]) == len(held) + 1 < len(whole.weight[0]) == 25
    assert set(part.place.tolist()) == set(range(len(held) + 1))
    assert not part.weight[0][0].any()
    torch.testing.assert_close(part(test), whole(test), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fold", ["valid", "test"])
@pytest.mark.parametrize("task", ["next", "likes", "kind", "kinds", "value"])
def test_metrics_are_those_of_the_kind(dataset, task, fold):
    for model in (baselines.trivial, baselines.cheap):
        got = model(dataset, task, fold)
        assert set(got) == {"name", "metrics"}
        assert dataset.task(task).spec.metric in got["metrics"]
        assert all(np.isfinite(value) for value in got["metrics"].values())


@pytest.mark.parametrize("task", ["next", "likes", "kind", "value"])
def test_a_part_of_the_users_is_named(dataset, task, monkeypatch):
    monkeypatch.setattr(baselines, "_MOST_NEIGHBOURS", 50)
    monkeypatch.setattr(baselines, "_MOST_REGRESSION", 50)
    monkeypatch.setattr(baselines, "_MOST_PAIRS", 300)
    assert "learned from 50 " in baselines.cheap(dataset, task)["name"]


def test_cosines_are_counted_in_blocks_of_bounded_memory(dataset, monkeypatch):
    spec, examples = dataset.task("likes").spec, dataset.examples("likes", "test")
    model = baselines.NearestUsers(dataset, spec)
    sets = [np.zeros((len(part), 25)) for part in (examples, model.train)]
    for rows, part in zip(sets, (examples, model.train), strict=True):
        for row, user in enumerate(part.user.tolist()):
            rows[row, dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]] = 1
    shared, whole = sets[0] @ sets[1].T, model._cosine(examples)
    assert np.array_equal(np.rint(6 * whole.numpy()), shared)  # six items each
    counted, bincount = [], np.bincount

    def counting(values, *more, **named):
        counted.append(len(values))
        return bincount(values, *more, **named)

    monkeypatch.setattr(baselines, "_MOST_SHARED", 500)
    monkeypatch.setattr(np, "bincount", counting)
    assert np.array_equal(model._cosine(examples), whole)
    assert sum(counted) == shared.sum()
    assert max(counted) <= 500 + np.diff(model.begin).max()


@pytest.mark.parametrize("task", ["next", "likes"])
def test_a_large_fold_is_ranked_for_a_part_that_is_named(dataset, monkeypatch, task):
    whole = baselines.cheap(dataset, task)
    monkeypatch.setattr(baselines, "_MOST_MEASURED", 20)
    got = baselines.cheap(dataset, task)
    count = len(dataset.examples(task, "test"))
    assert got["name"] == f"{whole['name']}, measured on 20 of {count} test examples"
    assert (got["metrics"] != whole["metrics"]) == (task == "likes")  # the chain ranks every target first
    assert got == baselines.cheap(dataset, task)


@pytest.mark.parametrize("task", ["kind", "kinds", "value"])
def test_labels_of_many_users_are_measured_some_at_a_time(dataset, task, monkeypatch):
    whole, read, sets = baselines.cheap(dataset, task, "train"), [], baselines._sets

    def counting(dataset, examples):
        read.append(len(examples))
        return sets(dataset, examples)

    monkeypatch.setattr(baselines, "_EXAMPLES", 30)
    monkeypatch.setattr(baselines, "_sets", counting)
    assert baselines.cheap(dataset, task, "train") == whole
    count = len(dataset.examples(task, "train"))
    assert max(read) == count  # where a model learns of them
    assert read.count(30) == count // 30


def test_no_valid_users_and_empty_histories(tmp_path):
    with DatasetWriter(tmp_path / "data", "small", 3) as writer:
        writer.histories(np.arange(8), [1, 2, 3, 1, 1, 2, 3, 1], [0, 2, 4, 4, 6, 8, 8, 8, 8], [0, 0, 0, 0, 2, 2, 2, 2])
        cut = [2, 2, 0, 2, 2, 0, 0, 0]
        writer.task(TaskSpec("kind", "binary"), np.arange(8), [0, 1] * 4, cut)
        writer.task(TaskSpec("more", "items", repeats=True), np.arange(8), [1, 2, 3, 3] * 2, cut)
    dataset = Dataset(tmp_path / "data")
    for task in ("next", "kind", "more"):
        assert baselines.cheap(dataset, task)["metrics"]
