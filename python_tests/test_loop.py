"""The training loop on one weight: when it stops, what it keeps, and how each step is taken."""

import logging
import math
from unittest import mock

import pytest
import torch

from pcl_ext.infer import Score
from pcl_ext.loop import CosineSchedule, LoopConfig, Problem, fit


def one_weight(scores: list[Score], metric="auc", config=None, **problem) -> tuple[list[dict], list[float], float]:
    """Training of one weight that starts at 1 and falls by 1 a step, judged by `scores` in turn.

    -> the curve, the weight at each validation, the weight in the end
    """
    layer, seen, scores = torch.nn.Linear(1, 1, bias=False), [], iter(scores)
    torch.nn.init.ones_(layer.weight)

    def validate() -> Score:
        seen.append(layer.weight.item())
        return next(scores)

    problem = {"batches": one_step, "loss": lambda x: layer(x).sum()} | problem
    problem = Problem("t", validate=validate, metric=metric, identity={}, **problem)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    with mock.patch("pcl_ext.loop.CosineSchedule"):
        curve = fit(layer, optimizer, problem, config or LoopConfig(epochs=3))
    return curve, seen, layer.weight.item()


def one_step(epoch, start):
    return 1, iter([torch.ones(1, 1)][start:])


def score(value: float, loss: float = 1.0) -> Score:
    """`value` is the auc, and what the rmse lacks: equally good by either metric."""
    return Score({"auc": value, "rmse": 1 - value}, {"auc": 0.1, "rmse": 0.1}, loss, 10, "")


@pytest.mark.parametrize("metric", ["auc", "rmse"])
@pytest.mark.parametrize("better", [False, True])
def test_a_start_is_kept_where_training_does_not_beat_it(better, metric, caplog):
    caplog.set_level(logging.INFO, "pcl_ext")
    scores = [score(0.5), score(0.4), score(0.6 if better else 0.5), score(0.3)]
    curve, seen, weight = one_weight(scores, metric, keep_start=True)
    assert seen == [1, 0, -1, -2]
    assert [entry["best"] for entry in curve] == [False, better, False]
    assert weight == (-1 if better else 1)
    value = 0.6 if better else 0.5
    which = "epoch 1 (of 3, from 0)" if better else "the start, which no epoch beat,"
    said = f"t: {which} is kept, {metric} {value if metric == 'auc' else 1 - value:.4f} on the valid users"
    assert caplog.messages[-1] == said


@pytest.mark.parametrize("metric", ["auc", "rmse"])
def test_a_metric_that_is_not_defined_is_below_all(metric):
    curve, _, weight = one_weight([score(math.nan), score(0.4), score(math.nan)], metric)
    assert [entry["best"] for entry in curve] == [True, True, False]
    assert weight == -1


def test_the_average_over_epochs_is_judged_and_kept():
    curve, seen, weight = one_weight([score(0.5), score(0.6), score(0.7)], average=True)
    assert seen == pytest.approx([0, -2 / 3, -8 / 6])  # of 0, -1, -2 with weights 1, 2, 3
    assert weight == pytest.approx(-8 / 6)
    _, _, weight = one_weight([score(0.5), score(0.6), score(0.55)], average=True)
    assert weight == pytest.approx(-2 / 3)


@pytest.mark.parametrize("metric", ["auc", "rmse"])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([score(0.50, 3), score(0.55, 2), score(0.50, 1)], [True, True, True]),  # ties: the loss decides
        ([score(0.50, 1), score(0.55, 2), score(0.58, 3)], [True, False, False]),
        ([score(0.50, 1), score(0.65, 2), score(0.58, 3)], [True, True, False]),  # no tie: the metric does
        ([score(0.70, 3), score(0.65, 2), score(0.55, 1)], [True, True, False]),  # within .1 of the best, not the kept
        ([score(0.50, 1), score(0.58, 2), score(0.66, 3)], [True, False, True]),  # what was kept is no tie any more
    ],
)
def test_ties_go_to_the_least_loss(scores, best, metric):
    curve, _, _ = one_weight(scores, metric, ties_by_loss=True)
    assert [entry["best"] for entry in curve] == best


def test_patience_counts_the_epochs_since_the_best():
    scores = [score(value) for value in (0.4, 0.3, 0.5, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6)]
    curve, seen, weight = one_weight(scores, config=LoopConfig(epochs=9, patience=2))
    assert len(curve) == 5
    assert seen == [0, -1, -2, -3, -4]
    assert weight == -2


def test_patience_does_not_end_the_first_epochs():
    scores = [score(value) for value in (0.4, 0.3, 0.3, 0.3, 0.6, 0.5, 0.5, 0.5)]
    curve, _, weight = one_weight(scores, config=LoopConfig(epochs=8, patience=2), least_epochs=5)
    assert (len(curve), weight) == (7, -4)
    curve, _, weight = one_weight(scores, config=LoopConfig(epochs=8, patience=2), least_epochs=4)
    assert (len(curve), weight) == (4, 0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_is_taken_in_the_precision_that_is_asked_for(precision):
    layer, dtypes = torch.nn.Linear(1, 1), []

    def loss(x):
        dtypes.append(layer(x).dtype)
        return layer(x).sum()

    one_weight([score(0.5)], config=LoopConfig(epochs=1, precision=precision), loss=loss)
    assert dtypes == [getattr(torch, precision)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_valid_loss_that_is_not_finite_stops_the_run(value):
    """No record of a run can hold it."""
    with pytest.raises(FloatingPointError, match=f"t: the loss on the valid users is {value}; mend their targets"):
        one_weight([score(0.5), score(0.5, value)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value):
    seen, weight = [], torch.ones(1, requires_grad=True)

    def loss(x):
        seen.append(x)
        return (x * weight * value).sum()

    with pytest.raises(FloatingPointError, match=f"t: the loss is {value}; lower learning_rate .now 0.001"):
        one_weight([], loss=loss)
    assert len(seen) == 1


def test_the_rate_rises_shortly_and_falls_along_a_cosine():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 3.0)]
    optimizer = torch.optim.SGD(groups)
    schedule, rates = CosineSchedule(optimizer), []
    for done in (0, 0.01, 1 / 3, 0.5, 2 / 3, 1):
        schedule(done)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(3 * rates[-1])
    warm = 0.52 * (1 + math.cos(0.01 * math.pi)) / 2
    assert rates == pytest.approx([0.02, warm, 0.75, 0.5, 0.25, 0])


def test_the_rate_follows_the_share_of_all_steps_that_is_done():
    layer = torch.nn.Linear(1, 1)
    problem = Problem(
        "t",
        lambda epoch, start: (2, iter([torch.ones(1, 1)] * 2)),
        lambda x: layer(x).sum(),
        lambda: score(0.5),
        "auc",
        {},
    )
    with mock.patch("pcl_ext.loop.CosineSchedule") as schedule:
        fit(layer, torch.optim.SGD(layer.parameters(), 1.0), problem, LoopConfig(epochs=2))
    assert [call.args for call in schedule.return_value.call_args_list] == [(0,), (0.25,), (0.5,), (0.75,)]
