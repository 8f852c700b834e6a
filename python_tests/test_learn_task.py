"""What `pretrain` and `learn_task` give the loop: how it judges, its rates, its loss, and whose a checkpoint is."""

import copy
import dataclasses
import shutil
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import BACKBONE

from pcl_ext import infer, train
from pcl_ext.data import Dataset
from pcl_ext.model import BackboneConfig, MemoryConfig, Task
from pcl_ext.task import TaskSpec
from pcl_ext.train import RARE_EPS, LearnConfig, PretrainConfig, learn_task, pretrain, task_rates


def given(model, dataset, name, config):
    """The optimiser and the problem that `fit` is given for a task."""
    with mock.patch.object(train, "fit", return_value=[]) as fit:
        learn_task(copy.deepcopy(model), dataset, name, config)
    return fit.call_args.args[1:3]


@pytest.mark.parametrize(
    ("name", "cold", "ridge", "expected"),
    [
        ("range", True, (3.0,), (True, False)),
        ("range", True, (), (False, False)),
        ("range", False, (3.0,), (False, False)),
        ("click", True, (3.0,), (False, True)),
    ],
)
def test_a_ridge_start_may_be_kept_and_labels_tie(dataset, pretrained, name, cold, ridge, expected):
    model = copy.deepcopy(pretrained)
    model.backbone.trained_items[1:] = not cold
    config = LearnConfig(ridge=ridge, learning_rate=0.5, head_rate=0.2, ridge_rate=0.1)
    optimizer, problem = given(model, dataset, name, config)
    assert (problem.keep_start, problem.ties_by_loss) == expected
    assert problem.average
    assert problem.least_epochs == (0 if problem.keep_start else 20)
    assert LearnConfig(epochs=5).least_epochs == 3
    factor = 0.1 if expected[0] else 1.0
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 * factor, 0.2 * factor}


def test_heads_and_item_tables_of_all_members_have_rates_of_their_own(dataset, pretrained):
    model, config = copy.deepcopy(pretrained), LearnConfig(learning_rate=0.5, head_rate=0.2)
    task = model.add_task(dataset.task("click").spec, MemoryConfig(prompt_len=3, members=2))
    groups = task_rates(task, config, 0.5)
    rest, heads, tables = (group.pop("params") for group in groups)
    parts = task, task.others[0]
    assert groups == [{"lr": 0.25}, {"lr": 0.1}, {"lr": 0.25, "eps": RARE_EPS / 2}]
    assert [id(p) for p in rest] == [id(task.tail())]
    assert {id(p) for p in heads} == {id(p) for part in parts for p in part.head.parameters()}
    assert {id(p) for p in tables} == {id(part.memories["item_memory"].table) for part in parts}
    model.backbone.trained_items[:] = False
    items = model.add_task(dataset.task("range").spec)
    rates = [{key: group[key] for key in group if key != "params"} for group in task_rates(items, config)]
    assert rates == [{"lr": 0.5}, {"lr": 0.2}, {"lr": 0.5}]


def test_the_loss_of_several_members_is_the_mean_of_theirs(dataset, pretrained):
    model = copy.deepcopy(pretrained).eval()
    task = model.add_task(dataset.task("click").spec, MemoryConfig(members=2))
    for part in (task, *task.others):
        torch.nn.init.normal_(part.head.linear.weight)
    examples = dataset.examples("click", "train")
    batches, loss = train._task_steps(model, dataset, task, examples, LearnConfig())
    batch = next(batches(0, 0)[1])
    outputs = model.member_outputs(batch.history, "click")
    one, other = (task.loss(output, batch.target, batch.target_row) for output in outputs)
    assert abs(one - other) > 0.01
    torch.testing.assert_close(loss(batch), (one + other) / 2)


def test_weight_decay_is_for_the_steps_of_all_epochs(dataset, pretrained):
    shape = BackboneConfig(dataset.num_items, **BACKBONE)
    settings = {"epochs": 3, "batch_tokens": 300}
    with (
        mock.patch.object(train, "fit", return_value=[{"epoch": 0, "best": True}]) as fit,
        mock.patch.object(train, "adamw", wraps=train.adamw) as adamw,
    ):
        pretrain(dataset, shape, PretrainConfig(**settings))
        learn_task(copy.deepcopy(pretrained), dataset, "click", LearnConfig(**settings))
    steps = [call.args[2].batches(0, 0)[0] for call in fit.call_args_list]
    assert min(steps) > 1
    assert [call.args[2] for call in adamw.call_args_list] == [3 * count for count in steps]


def with_other_clicks(dataset, path):
    """The dataset, every target of `click` turned round."""
    shutil.copytree(dataset.path, path, ignore=shutil.ignore_patterns(".cache"))
    file = path / "tasks/click.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("target")
    target = pa.array(1 - table["target"].to_numpy(), table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), target), file)
    header = path / "dataset.json"
    header.write_text(header.read_text().replace('"sha256"', '"was"'))  # another table, on purpose
    return Dataset(path)


def test_the_checkpoint_of_another_table_backbone_or_order_of_tasks_is_refused(dataset, pretrained, tmp_path):
    config, path = LearnConfig(epochs=1), tmp_path / "click.safetensors"

    def learn(model, dataset):
        learn_task(model, dataset, "click", config, checkpoint=path)

    learn(copy.deepcopy(pretrained), dataset)
    with pytest.raises(ValueError, match="the checkpoint of a run with table = "):
        learn(copy.deepcopy(pretrained), with_other_clicks(dataset, tmp_path / "other"))
    other, later = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    other.backbone.table[7] += 1
    with pytest.raises(ValueError, match="the checkpoint of a run with backbone.table = "):
        learn(other, dataset)
    later.add_task(dataset.task("segment").spec)
    later.freeze_task("segment")
    with pytest.raises(ValueError, match=r"with after = \['next'\], this one has \['next', 'segment'\]"):
        learn(later, dataset)
    learn(copy.deepcopy(pretrained), dataset)


def test_the_checkpoint_of_another_shape_is_refused(dataset, tmp_path):
    shape, path = BackboneConfig(dataset.num_items, **BACKBONE), tmp_path / "next.safetensors"
    pretrain(dataset, shape, PretrainConfig(epochs=1), path)
    with pytest.raises(ValueError, match="the checkpoint of a run with backbone.dropout = 0.2, this one has 0.1"):
        pretrain(dataset, dataclasses.replace(shape, dropout=0.1), PretrainConfig(epochs=1), path)


def test_the_loss_of_a_measure_does_not_depend_on_the_batches(dataset, pretrained, monkeypatch):
    """`range` has one to several targets an example: each counts alike."""
    model, examples = copy.deepcopy(pretrained), dataset.examples("range", "train")
    model.add_task(dataset.task("range").spec)
    assert examples.target_offsets.diff().unique().numel() > 1
    whole = infer.measure(model, dataset, "range", examples)
    monkeypatch.setattr(infer, "BATCH_TOKENS", 50)
    assert infer.measure(model, dataset, "range", examples).loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("most", [20, 90])
def test_a_head_is_started_on_no_more_examples_than_are_asked_for(dataset, pretrained, monkeypatch, most):
    """Of many more a sample; of a few more what the last batch holds comes on top."""
    monkeypatch.setattr(infer, "BATCH_TOKENS", 100)
    model, whole = copy.deepcopy(pretrained), len(dataset.examples("click", "train"))
    assert 90 + 10 < whole < 2 * 90
    model.add_task(dataset.task("click").spec)
    with mock.patch.object(Task, "fit_head") as fit_head:
        infer.fit_head(model, dataset, "click", max_examples=most)
    features, target = fit_head.call_args.args
    assert len(features) == len(target)
    assert len(features) == most if 2 * most < whole else most <= len(features) < whole


@pytest.mark.parametrize("fails", ["fit_head", "close"])
def test_where_learning_fails_the_task_is_gone(dataset, pretrained, fails):
    model = copy.deepcopy(pretrained)
    with mock.patch.object(Task, fails, side_effect=MemoryError), pytest.raises(MemoryError):
        learn_task(model, dataset, "click", LearnConfig(epochs=1))
    assert "click" not in model.task_names


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_a_checkpoint_holds_is_not_computed_again(dataset, pretrained, tmp_path, there):
    model, checkpoint = copy.deepcopy(pretrained), tmp_path / "range.safetensors"
    model.backbone.trained_items[:] = False
    with mock.patch.object(train, "fit", return_value=[]) as fit, mock.patch.object(train, "start_items") as start:
        if there:
            checkpoint.touch()
        learn_task(model, dataset, "range", LearnConfig(), checkpoint=checkpoint)
    assert start.called != there
    assert fit.call_args.args[2].keep_start


def test_other_open_tasks_are_left_as_they_are(dataset, pretrained, tmp_path):
    """What another loop has taught them since the checkpoint was written, too."""
    config, checkpoint = LearnConfig(epochs=1), tmp_path / "click.safetensors"
    for rows in (0.0, 1.0):
        model = copy.deepcopy(pretrained)
        other = model.add_task(TaskSpec("other", "binary"))
        torch.nn.init.constant_(other.tail(), rows)
        learn_task(model, dataset, "click", config, checkpoint=checkpoint)
        assert bool((other.tail() == rows).all())
