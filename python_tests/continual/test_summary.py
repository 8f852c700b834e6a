"""What is made of the results: gains paired by fold, the hardest baseline, hindsight, intervals."""

import numpy as np
import pytest
import torch

from benchmarks.continual import intervals
from benchmarks.continual.intervals import compare, weighted
from benchmarks.continual.summary import Row, Summary, decimals
from pcl_ext.metrics import TaskMetrics
from pcl_ext.task import TaskSpec


def test_gains_are_paired_by_fold():
    metric = {"segment": "accuracy", "range": "rmse"}
    values = {
        "pcl": {("a", 0): {"segment": 0.6, "range": 1.0}, ("a", 1): {"segment": 0.8, "range": 1.0}}
        | {("b", 0): {"segment": 0.6, "range": 3.0}, ("c", 0): {"segment": 9.0, "range": 9.0}},
        "mtl": {("a", 0): {"segment": 0.5, "range": 2.0}, ("a", 1): {"segment": 0.5, "range": 2.0}}
        | {("b", 0): {"segment": 0.5, "range": 3.0}},
        "ewc": {("d", 0): {"segment": 0.5, "range": 2.0}},
    }
    summary = Summary({}, values, {}, metric, {}, {})
    gains = summary.paired("pcl", "mtl")  # by fold: segment .4, .2; range .5, 0; mean .45, .1
    expected = {"segment": (0.3, 0.1), "range": (0.25, 0.25), "mean": (0.275, 0.175)}
    assert gains.keys() == expected.keys()
    assert all((gains[t].mean, gains[t].error) == pytest.approx(expected[t]) for t in expected)
    assert summary.paired("pcl", "ewc") == {}


def test_hindsight_picks_by_task_fold_and_seed():
    metric = {"segment": "accuracy", "spend": "rmse"}
    values = {
        "pcl": {("a", 0): {"segment": 0.5, "spend": 2.0}, ("b", 0): {"segment": 0.8, "spend": 1.0}},
        "mtl": {("a", 0): {"segment": 0.6, "spend": 3.0}, ("b", 0): {"segment": 0.4, "spend": 0.5}},
        "ewc": {("a", 0): {"segment": 0.1, "spend": 1.0}, ("b", 1): {"segment": 0.9, "spend": 0.1}},
    }
    summary = Summary({}, values, {}, metric, {}, {})
    picked = summary.hindsight("pcl", ("mtl",))  # a: +20 %, 0; b: 0, +50 %
    assert (picked.mean, picked.error) == pytest.approx((0.175, 0.075))
    picked = summary.hindsight("pcl", ("mtl", "ewc"))  # a alone is shared: +20 %, +50 %
    assert picked.mean == pytest.approx(0.35)
    assert summary.hindsight("pcl", ()).mean == 0
    assert Summary({}, values | {"hat": {("c", 0): {}}}, {}, metric, {}, {}).hindsight("pcl", ("hat",)) is None


def test_the_strongest_baseline_is_the_one_that_is_hardest_to_beat():
    """Not the one that gains most over a baseline: against a ruined one, a single task decides."""
    values = {
        "fine": {("a", 0): {"next": 0.01, "segment": 0.5}},
        "ewc": {("a", 0): {"next": 0.10, "segment": 0.9}},  # over fine +900 %, +80 %
        "conure": {("a", 0): {"next": 0.12, "segment": 0.5}},  # +1100 %, +0 %
        "pcl": {("a", 0): {"next": 0.12, "segment": 0.9}},  # over ewc +20 %, +0 %; over conure +0 %, +80 %
    }
    rows = {name: Row(name, 1, folds["a", 0], {}, 0.0, 0, 0.0) for name, folds in values.items()}
    summary = Summary(rows, values, {}, {"next": "mrr@5", "segment": "accuracy"}, {}, {})
    baselines = ("fine", "ewc", "conure")
    assert summary.strongest(baselines, "pcl") == "ewc"
    assert summary.strongest(baselines, "lwf") is None
    assert summary.strongest(("hat",), "pcl") is None
    assert summary.gain("pcl", "ewc") == pytest.approx(0.1)
    values["fine"][("a", 0)]["next"] = 0.0
    values["pcl"][("a", 0)]["next"] = 0.0  # over fine: nothing over nothing
    assert summary.strongest(("fine", "ewc"), "pcl") == "ewc"
    values["pcl"][("a", 0)]["next"] = 0.12
    values["conure"][("b", 0)] = {"next": 9.0, "segment": 9.0}
    assert summary.gain("pcl", "conure") == pytest.approx(0.4), "on what both have"


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("auc", "binary"),
        ("log_loss", "binary"),
        ("accuracy", "classes"),
        ("macro_f1", "classes"),
        ("rmse", "regression"),
    ],
)
def test_weighted_metrics_are_those_of_the_repeated_sample(metric, kind):
    spec = TaskSpec("t", kind, num_classes=3 if kind == "classes" else None)
    output = torch.randn(30, 3) if kind == "classes" else torch.randn(30).mul(2).round()
    label = torch.randn(30) if kind == "regression" else torch.randint(3 if kind == "classes" else 2, (30,))
    counts = torch.randint(3, (30,))
    metrics = TaskMetrics(spec)
    rows = torch.repeat_interleave(torch.arange(30), counts)
    metrics.update(output[rows], label[rows], torch.arange(len(rows)))
    got = weighted(metric, output.double().numpy(), label.numpy(), counts[None].double().numpy())
    assert got[0] == pytest.approx(metrics.compute()[metric], rel=1e-6)


def test_intervals_hold_the_gain_and_see_a_clear_difference():
    generator = np.random.default_rng(0)

    def outputs(quality):
        label = generator.integers(0, 2, 400)
        value = quality * label + generator.normal(size=400)
        parts = {"a/user": np.arange(400), "a/value": value, "a/label": label}
        items = {"b/user": np.arange(400), "b/value": np.full(400, 0.2 * quality), "b/label": label}
        return parts | items

    metric = {"a": "auc", "b": "mrr@5"}
    good, bad = ({("f", 0): outputs(q), ("f", 1): outputs(q)} for q in (2.0, 0.5))
    found = compare(good, bad, metric, draws=200)
    assert all(part.low <= part.gain <= part.high for part in found.values())
    assert found["a"].low > 0
    assert found["b"].gain == pytest.approx(3.0)
    same = compare(good, good, metric, draws=200)
    assert same["mean"].gain == same["mean"].low == same["mean"].high == 0


def test_draws_without_a_value_are_left_out():
    """Of two users with a label each, half of the draws know one class alone."""
    parts = {"a/user": np.arange(2), "a/value": np.array([1.0, 2.0]), "a/label": np.array([0, 1])}
    parts |= {"b/user": np.arange(50), "b/value": np.arange(50.0), "b/label": np.zeros(50)}
    found = compare({("f", 0): parts}, {("f", 0): parts}, {"a": "auc", "b": "mrr@5"}, draws=200)
    assert all((part.gain, part.low, part.high) == (0, 0, 0) for part in found.values())
    label = parts["a/label"] * 0
    assert np.isnan(weighted("auc", parts["a/value"], label, np.ones((1, 2)))).all()
    assert np.isnan(weighted("accuracy", parts["a/value"], label, np.zeros((1, 2)))).all()


def test_draws_differ_by_fold_and_do_not_depend_on_how_many_are_held(monkeypatch):
    users = {"fold-01": np.arange(30), "fold-10": np.arange(30)}

    def drawn():
        parts = list(intervals._draw(users, 20))
        return {fold: np.concatenate([part[fold][1] for part in parts]) for fold in users}

    whole = drawn()
    assert (whole["fold-01"][0] == 1).all()
    assert (whole["fold-01"].sum(1) == 30).all()
    assert not np.array_equal(whole["fold-01"], whole["fold-10"])
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 60 * 7)
    for fold, counts in drawn().items():
        assert np.array_equal(counts, whole[fold])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, ".1234"),
        (-0.05, "-.0500"),
        (10.1234, "10.1234"),
        (100.0, "100.0000"),
        (-20.5, "-20.5000"),
        (-1e-5, ".0000"),
    ],
)
def test_numbers_are_shown_as_they_are(value, text):
    assert decimals(value) == text


def test_intervals_refuse_methods_with_other_runs():
    with pytest.raises(ValueError, match="same folds and seeds"):
        compare({("f", 0): {}}, {("f", 1): {}}, {})
