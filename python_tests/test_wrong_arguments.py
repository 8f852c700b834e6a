"""What a caller is told who hands over the wrong thing: what, where and how to mend it."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from runs import BACKBONE, pretrain_in_memory

from pcl_ext import Backbone, MemoryConfig, PackedBatch, TaskSpec, UserModel
from pcl_ext.metrics import ResultMatrix, TaskMetrics
from pcl_ext.model import BackboneConfig
from pcl_ext.train import LearnConfig, PretrainConfig, learn_task, pretrain


@pytest.fixture(scope="module")
def model(dataset):
    return pretrain_in_memory(dataset)


EMPTY = PackedBatch.from_lists([[]], num_items=5, max_len=2)
WRONG_TYPES = {
    "dataset must be a Dataset, got str": lambda model, data: learn_task(model, "shop", "click"),
    "model must be a UserModel, got Backbone": lambda model, data: learn_task(model.backbone, data, "click"),
    "config must be a LearnConfig, got PretrainConfig": lambda model, data: learn_task(
        model, data, "click", PretrainConfig()
    ),
    "backbone must be a BackboneConfig, got dict": lambda model, data: pretrain(data, BACKBONE),
    "config must be a PretrainConfig, got LearnConfig": lambda model, data: pretrain(
        data, BackboneConfig(data.num_items, **BACKBONE), LearnConfig()
    ),
    "memory must be a MemoryConfig, got LearnConfig": lambda model, data: learn_task(
        model, data, "click", memory=LearnConfig()
    ),
    "task must be a name, a str, got TaskSpec": lambda model, data: model(EMPTY, TaskSpec("next", "items")),
    "task must be a name, a str, got Tensor; a task of each row is given as task_index=": lambda model, data: model(
        EMPTY, torch.zeros(1, dtype=torch.int64)
    ),
    "batch must be a PackedBatch, say of PackedBatch.from_lists, got Tensor": lambda model, data: model.backbone(
        torch.ones(1, 2)
    ),
    "batch must be a PackedBatch, say of PackedBatch.from_lists, got list": lambda model, data: model.member_outputs(
        [[1, 2]], "next"
    ),
    "or a UserState, got tuple": lambda model, data: model.user_state(([1, 2],)),
    "text must be a Tensor [256], got list": lambda model, data: model.add_task(
        TaskSpec("ctr", "binary"), text=[0.0] * 256
    ),
    "spec must be a TaskSpec, got str": lambda model, data: model.add_task("click"),
    "config must be a MemoryConfig, got dict": lambda model, data: model.add_task(TaskSpec("ctr", "binary"), {}),
    "backbone must be a pcl_ext.Backbone, got Linear": lambda model, data: UserModel(torch.nn.Linear(4, 4)),
    "config must be a BackboneConfig, got int": lambda model, data: Backbone(50),
    "batch must be a PackedBatch, say of PackedBatch.from_lists, or a UserState, got list": lambda model, data: (
        model.encode([[1, 2]])
    ),
}


@pytest.mark.parametrize("message", WRONG_TYPES)
def test_a_wrong_type_is_named(model, dataset, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        WRONG_TYPES[message](model, dataset)
    assert model.task_names == ["next"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": float("inf")}, "learning_rate must be a number above 0, got inf"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number above 0, got '1e-3'"),
        ({"head_rate": 0}, "head_rate must be a number above 0, got 0"),
        ({"ridge_rate": -1.0}, "ridge_rate must be a number above 0, got -1.0"),
        ({"weight_decay": None}, "weight_decay must be a number of at least 0, got None"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0, got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be a number of at least 0, got inf"),
        ({"checkpoint_seconds": "now"}, "checkpoint_seconds must be a number of at least 0, got 'now'"),
        ({"ridge": 3.0}, "ridge must be a list of strengths above 0, got 3.0"),
        ({"ridge": None}, "ridge must be a list of strengths above 0, got None"),
        ({"ridge": (3.0, "30")}, "ridge must be a list of strengths above 0, got (3.0, '30')"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LearnConfig(**settings)
    assert LearnConfig(learning_rate=np.float32(1e-3)).learning_rate == np.float32(1e-3)
    assert LearnConfig(checkpoint_seconds=float("inf"), weight_decay=0, ridge=[]).ridge == ()


def test_numbers_of_numpy_are_settings_and_json():
    shape = BackboneConfig(np.int64(50), dim=np.int32(8), dropout=np.float32(0.25))
    config = LearnConfig(
        np.int64(3), learning_rate=np.float32(0.5), ridge=(np.float64(3.0),), weight_decay=np.float16(1)
    )
    memory = MemoryConfig(prompt_len=np.int16(2), dropout=np.float32(0.5))
    assert json.loads(json.dumps(asdict(shape))) == asdict(BackboneConfig(50, dim=8, dropout=0.25))
    assert json.loads(json.dumps(asdict(config)))["learning_rate"] == 0.5
    assert json.loads(json.dumps(asdict(memory)))["prompt_len"] == 2
    assert (type(config.epochs), type(config.ridge[0]), type(config.weight_decay)) == (int, float, float)


def test_a_batch_lies_where_the_model_does(model):
    batch = PackedBatch.from_lists([[1, 2]], num_items=50, max_len=20).to("meta")
    for call in (lambda: model(batch, "next"), lambda: model.encode(batch), lambda: model.backbone(batch)):
        with pytest.raises(ValueError, match=r"where the model is, on cpu, got meta; batch.to\('cpu'\)"):
            call()


def test_an_older_id_that_the_model_does_not_know_is_named(model):
    known = model.backbone.config.num_items
    batch = PackedBatch.from_lists([[known + 3, *[1] * 20]], num_items=known + 9, max_len=model.backbone.config.max_len)
    with pytest.raises(ValueError, match=rf"ids in 1..{known}, got {known + 3} among what is older"):
        model(batch, "next")


@pytest.mark.parametrize("text", [torch.zeros(3), torch.zeros(256, dtype=torch.int64), torch.full((256,), torch.nan)])
def test_a_text_is_so_many_finite_numbers(model, text):
    with pytest.raises(ValueError, match=r"text must be \[256\] finite floating numbers"):
        model.add_task(TaskSpec("ctr", "binary"), text=text)
    assert model.task_names == ["next"]


def test_a_closed_task_has_nothing_to_train(model):
    for parameters in (model.task("next").memory_parameters, model.task("next").head_parameters):
        with pytest.raises(ValueError, match="task 'next' is closed and never changes: remove it to learn it anew"):
            parameters()


@pytest.mark.parametrize("readout", [3, ["last", 3]])
def test_a_readout_is_one_of_the_known(readout):
    with pytest.raises(ValueError, match="readout must name one or more of last, mean"):
        MemoryConfig(readout=readout)


@pytest.mark.parametrize("name", ["tied", "whole_history"])
@pytest.mark.parametrize("value", [1, np.True_])  # the latter JSON does not take: it was found while learning
def test_what_is_true_or_false_is_a_bool(name, value):
    with pytest.raises(ValueError, match=f"{name} must be true"):
        MemoryConfig(**{name: value})


def test_an_unknown_task_is_a_value_error_everywhere(model, dataset):
    for call in (lambda: learn_task(model, dataset, "churn"), lambda: model.predict([[1]], "churn")):
        with pytest.raises(
            ValueError, match="task must be one of next, .*got 'churn'|task must be one of next, got 'churn'"
        ):
            call()


def test_one_history_in_place_of_a_list_of_them_is_told_so(model):
    with pytest.raises(ValueError, match=re.escape("got 1; one history is a list in a list: [[1, 2, 3]]")):
        model.predict([1, 2, 3], "next")


def test_windows_hold_an_event_at_least(dataset):
    rows = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        PackedBatch.from_stored(dataset.items, dataset.offsets, rows, rows + 1, 0)


@pytest.mark.parametrize("metric", ["map@5", "mrr", "hr@0", "auc"])
def test_values_are_of_a_metric_of_items(metric):
    metrics = TaskMetrics(TaskSpec("next", "items"))
    with pytest.raises(ValueError, match="has no targets yet"):
        metrics.values("mrr@5")
    metrics.update(torch.rand(2, 5), torch.tensor([1, 2]), torch.arange(2))
    with pytest.raises(ValueError, match=f"metric must be one of mrr@5, ndcg@10, hr@10, got '{metric}'"):
        metrics.values(metric)


def test_a_result_matrix_says_which_argument_is_wrong():
    matrix = ResultMatrix()
    with pytest.raises(IndexError, match="after must be of a task, and there is none yet, got 0"):
        matrix.value(0, 0)
    matrix.add("click", "auc")
    with pytest.raises(IndexError, match="task 0 has no row yet, got row 0"):
        matrix.value(0, 0)
    matrix.append({"click": {"auc": 0.5}})
    with pytest.raises(IndexError, match=r"after must be in 0\.\.0, got 5"):
        matrix.value(5, "click")
    with pytest.raises(ValueError, match="after must be one of click, got 'churn'"):
        matrix.value("churn", "click")
    with pytest.raises(ValueError, match="metric of task 'click' must be one of auc, got 'log_loss'"):
        matrix.value(0, 0, "log_loss")


def test_memories_are_given_as_their_settings(model):
    with pytest.raises(ValueError, match="prompt_len must be a whole number"):
        model.add_task(TaskSpec("ctr", "binary"), MemoryConfig(prompt_len=-1))
