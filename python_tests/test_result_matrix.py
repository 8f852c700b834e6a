"""The matrix of results, and what is derived from it."""

import json

import pytest

from pcl_ext.metrics import ResultMatrix


def filled():
    matrix = ResultMatrix(["next", "spend", "age"], {"next": "mrr@5", "spend": "rmse", "age": "accuracy"})
    matrix.append({"next": {"mrr@5": 0.2, "hr@10": 0.4}})
    matrix.append({"next": {"mrr@5": 0.25}, "spend": {"rmse": 2.0}})
    matrix.append({"next": {"mrr@5": 0.1}, "spend": {"rmse": 3.0}, "age": {"accuracy": 0.5}})
    return matrix


@pytest.mark.parametrize(
    ("definition", "name", "lost"),
    [("first-last", "first - last", 0.1), ("max-last", "max - last", 0.15)],
)
def test_forgetting(definition, name, lost):
    got = filled().forgetting(definition)
    assert got["definition"] == name
    assert got["tasks"] == {"next": pytest.approx(lost), "spend": pytest.approx(1.0)}  # a larger rmse is a loss
    assert got["mean"] == pytest.approx((lost + 1) / 2)
    assert got["worst"] == pytest.approx(1.0)


def test_backward_transfer_is_positive_when_old_tasks_get_better():
    matrix = ResultMatrix(["a", "b"], {"a": "log_loss", "b": "auc"})
    matrix.append({"a": {"log_loss": 0.7}})
    matrix.append({"a": {"log_loss": 0.4}, "b": {"auc": 0.6}})
    assert matrix.backward_transfer() == pytest.approx(0.3)
    assert filled().backward_transfer() == pytest.approx(-0.55)


def test_nothing_changed_is_zero_exactly():
    matrix = ResultMatrix(["a", "b"], {"a": "auc", "b": "auc"})
    matrix.append({"a": {"auc": 0.61}})
    assert matrix.forgetting()["mean"] == 0
    matrix.append({"a": {"auc": 0.61}, "b": {"auc": 0.5}})
    assert matrix.forgetting() == {"definition": "first - last", "tasks": {"a": 0.0}, "mean": 0.0, "worst": 0.0}
    assert str(matrix.backward_transfer()) == "0.0"


def test_a_task_that_is_best_in_the_last_row_has_lost_nothing_of_its_best():
    matrix = ResultMatrix(["a", "b"], {"a": "auc", "b": "auc"})
    matrix.append({"a": {"auc": 0.5}})
    matrix.append({"a": {"auc": 0.7}, "b": {"auc": 0.5}})
    assert matrix.forgetting("max-last")["tasks"] == {"a": 0.0}
    assert matrix.forgetting()["tasks"] == {"a": pytest.approx(-0.2)}


def test_values_by_position_and_name():
    matrix = filled()
    assert matrix.value(2, 1) == matrix.value("age", "spend") == matrix.value(-1, -2) == 3.0
    assert matrix.value(0, 0, "hr@10") == 0.4
    with pytest.raises(IndexError, match="rows 2..2, got row 1"):
        matrix.value(1, 2)
    with pytest.raises(ValueError, match="got 'ctr'"):
        matrix.value(0, "ctr")


def test_json_there_and_back():
    matrix = filled()
    text = json.dumps(matrix.to_json(), allow_nan=False)
    assert ResultMatrix.from_json(json.loads(text)).to_json() == matrix.to_json()


def test_the_text_names_tasks_and_metrics():
    assert filled().to_text().splitlines() == [
        "after  next mrr@5  spend rmse  age accuracy",
        "next       0.2000                          ",
        "spend      0.2500      2.0000              ",
        "age        0.1000      3.0000        0.5000",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"next": {"mrr@5": 1}, "spend": {"rmse": 1}}, "row 0 must hold the tasks"),
        ({"next": {"hr@10": 1}}, "must hold mrr@5"),
        ({"next": {"mrr@5": float("nan")}}, "must be finite, got mrr@5 = nan"),
    ],
)
def test_refuses_a_row(row, message):
    with pytest.raises(ValueError, match=message):
        ResultMatrix(["next", "spend"], {"next": "mrr@5", "spend": "rmse"}).append(row)


def test_grows_by_tasks():
    matrix = filled()
    with pytest.raises(ValueError, match="add the task first"):
        matrix.append({})
    with pytest.raises(ValueError, match="got 'age' again"):
        matrix.add("age", "accuracy")
    matrix.add("uk", "auc")
    matrix.append({**matrix.rows[-1], "uk": {"auc": 0.7}})
    assert matrix.value("uk", "uk") == 0.7


@pytest.mark.parametrize("values", [[], {}, {"tasks": ["a"], "metric": {}, "rows": []}])
def test_refuses_what_is_no_matrix(values):
    with pytest.raises(ValueError, match=r"must (have the keys|name the metric)"):
        ResultMatrix.from_json(values)
