"""What training needs before it starts, and what decays."""

import copy
import math
import shutil
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import BACKBONE

from pcl_ext import infer, next_item, train
from pcl_ext.batch import PackedBatch
from pcl_ext.data import Dataset, plan
from pcl_ext.model import Backbone, BackboneConfig, UserModel
from pcl_ext.next_item import NextItemLoss, item_counts, shift
from pcl_ext.task import TaskSpec
from pcl_ext.train import (
    NEXT,
    LearnConfig,
    PretrainConfig,
    adamw,
    epoch_batches,
    learn_task,
    pretrain,
)


def without_train_users(dataset, path):
    shutil.copytree(dataset.path, path, ignore=shutil.ignore_patterns(".cache"))
    table = pq.read_table(path / "histories.parquet")
    fold = pa.array(["test" if value == "train" else value for value in table["fold"].to_pylist()])
    place = table.schema.get_field_index("fold")
    pq.write_table(table.set_column(place, "fold", fold), path / "histories.parquet")
    header = (path / "dataset.json").read_text().replace('"sha256"', '"was"')
    (path / "dataset.json").write_text(header)
    return Dataset(path)


def test_a_dataset_without_train_users_is_refused(dataset, tmp_path):
    torch.set_num_threads(1)
    model, _ = pretrain(dataset, BackboneConfig(dataset.num_items, **BACKBONE), PretrainConfig(epochs=1))
    empty = without_train_users(dataset, tmp_path / "empty")
    with pytest.raises(ValueError, match="has no train users with two events"):
        pretrain(empty, BackboneConfig(dataset.num_items, **BACKBONE))
    with pytest.raises(ValueError, match="has no train users with a target of 'click'"):
        learn_task(model, empty, "click")
    assert model.task_names == ["next"]


def test_a_checkpoint_may_be_named_by_a_text(dataset, tmp_path):
    path = tmp_path / "next.safetensors"
    pretrain(dataset, BackboneConfig(dataset.num_items, **BACKBONE), PretrainConfig(epochs=1), str(path))
    assert path.exists()


def test_a_backbone_of_another_catalogue_is_refused(dataset):
    with pytest.raises(ValueError, match="must be that of the dataset, got 7 and 50"):
        pretrain(dataset, BackboneConfig(7, **BACKBONE))


def test_biases_do_not_decay_and_long_runs_decay_less(dataset):
    weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    own = torch.nn.Parameter(torch.zeros(2, 2))
    given = [
        {"params": iter([bias, weight]), "lr": 0.1},
        {"params": [own], "lr": 0.2, "eps": 1e-3, "weight_decay": 2.0},
    ]
    groups = adamw(given, LearnConfig(weight_decay=0.5), 4000).param_groups
    assert [(g["params"], g["weight_decay"]) for g in groups] == [([weight], 0.25), ([bias], 0.0), ([own], 1.0)]
    assert [(g["lr"], g["eps"]) for g in groups] == [(0.1, 1e-8), (0.1, 1e-8), (0.2, 1e-3)]


def with_the_unit(dataset, path, unit):
    """The dataset, `spend` given in another unit."""
    shutil.copytree(dataset.path, path, ignore=shutil.ignore_patterns(".cache"))
    file = path / "tasks/spend.parquet"
    table = pq.read_table(file)
    target = pa.array(table["target"].to_numpy() * np.float32(unit))
    pq.write_table(table.set_column(table.schema.get_field_index("target"), "target", target), file)
    header = path / "dataset.json"
    header.write_text(header.read_text().replace('"sha256"', '"was"'))  # another table, on purpose
    return Dataset(path)


@pytest.mark.parametrize("unit", [1e-6, 1e4])
def test_a_regression_learns_the_same_in_any_unit(dataset, tmp_path, unit):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(dataset.num_items, **BACKBONE)))
    model.freeze_backbone()
    other = copy.deepcopy(model)
    config = LearnConfig(epochs=4, batch_tokens=300)
    want = learn_task(model, dataset, "spend", config)
    got = learn_task(other, with_the_unit(dataset, tmp_path / "unit", unit), "spend", config)
    assert want[-1]["loss"] < want[0]["loss"]
    for one, same in zip(got, want, strict=True):
        assert one["loss"] == pytest.approx(same["loss"], rel=1e-3)
        assert one["valid"]["rmse"] / unit == pytest.approx(same["valid"]["rmse"], rel=1e-3)


@pytest.mark.parametrize("most_planned", [1, 8])  # 1: some are drawn before they are planned, as of very many
@pytest.mark.parametrize("start", [0, 2])
def test_an_epoch_is_bounded_and_starts_anywhere(dataset, start, most_planned, monkeypatch):
    monkeypatch.setattr(train, "MOST_PLANNED", most_planned)
    examples, config = dataset.sequences("train", 20), LearnConfig(batch_tokens=100, epoch_tokens=400)
    steps, batches = epoch_batches(dataset, examples, config, 20, 3, start)
    whole = list(epoch_batches(dataset, examples, config, 20, 3, 0)[1])
    assert (steps, len(whole)) == (4, 4)
    for got, want in zip(list(batches), whole[start:], strict=True):
        assert torch.equal(got.index, want.index)
    other = epoch_batches(dataset, examples, config, 20, 4, 0)[1]
    assert not torch.equal(next(other).index, whole[0].index)


def test_of_very_many_examples_few_are_planned(dataset):
    examples, planned = dataset.sequences("train", 20), []
    config = LearnConfig(batch_tokens=10, epoch_tokens=20)
    events = int(examples.cut.sum())
    assert events > 16 * config.epoch_tokens
    with mock.patch.object(train, "plan", lambda some, **given: planned.append(len(some)) or plan(some, **given)):
        read = [
            batch.history.items
            for epoch in range(9)
            for batch in epoch_batches(dataset, examples, config, 20, epoch, 0)[1]
        ]
    assert set(planned) == {math.ceil(2 * 20 / events * len(examples))}
    assert len(torch.cat(read).unique()) > 30  # each epoch draws others


def test_an_epoch_of_few_labels_has_twenty_steps(dataset, monkeypatch):
    """Where patience counts epochs, they have to be worth something; pretraining has events enough."""
    steps = [LearnConfig().step_tokens(events) for events in (1, 5_120, 30_001, 81_920, 10**9)]
    assert steps == [256, 256, 1501, 4096, 4096]
    assert LearnConfig(batch_tokens=100).step_tokens(30_000) == 100
    assert PretrainConfig().step_tokens(30_000) == 4096
    monkeypatch.setattr(train, "LEAST_TOKENS", 1)
    assert epoch_batches(dataset, dataset.examples("click", "train"), LearnConfig(), 20, 0, 0)[0] >= 20


def test_shift_stays_on_the_device_of_its_histories():
    """Every tensor that it makes is made there: a default device of another kind changes nothing."""
    batch = PackedBatch.from_lists([[1, 2, 3], [], [4], [5, 6]], num_items=9, max_len=5)
    with torch.device("meta"):
        inputs, target = shift(batch)
    assert inputs.items.tolist() == [1, 2, 5]
    assert target.tolist() == [2, 3, 6]


def test_shift_pairs_each_event_with_the_next(dataset):
    batch = next(iter(epoch_batches(dataset, dataset.sequences("train", 20), LearnConfig(), 21, 0, 0)[1])).history
    history, target = shift(batch)
    for user in range(len(batch)):
        items = batch.items[batch.offsets[user] : batch.offsets[user + 1]]
        rows = slice(int(history.offsets[user]), int(history.offsets[user + 1]))
        assert torch.equal(history.items[rows], items[:-1])
        assert torch.equal(target[rows], items[1:])


def test_item_counts_are_of_train_users(dataset):
    train = np.flatnonzero(dataset.fold == 0)
    items = np.concatenate([dataset.items[dataset.offsets[u] : dataset.offsets[u + 1]] for u in train])
    want = np.bincount(items, minlength=dataset.num_items + 1)
    assert item_counts(dataset).tolist() == want.tolist()
    with mock.patch.object(next_item, "_USERS", 7):
        assert item_counts(dataset).tolist() == want.tolist()


def exact_and_sampled(dataset, repeats, negatives=5, max_len=20):
    """The two losses of one untrained model, and a batch."""
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(dataset.num_items, dropout=0.0, **BACKBONE)))
    task = model.add_task(TaskSpec("next", "items", repeats=repeats), NEXT)
    torch.nn.init.normal_(task.head.bias)
    windows = dataset.sequences("train", max_len)
    batch = next(epoch_batches(dataset, windows, LearnConfig(batch_tokens=60), max_len + 1, 0, 0)[1])
    return *(NextItemLoss(model.backbone, task, dataset, count) for count in (None, negatives)), batch


def loss_and_gradients(loss, batch):
    value = loss(batch)
    gradients = torch.autograd.grad(
        value, [loss.backbone.table, loss.task.head.bias, *loss.backbone.layers.parameters()]
    )
    return value.detach(), [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]


def test_what_earlier_windows_hold_is_not_chosen(dataset):
    """Windows of 4: against scores of all items, each row without all that its user's history holds so far."""
    loss, _, batch = exact_and_sampled(dataset, False, max_len=4)
    assert batch.history.older is not None
    history, target = shift(batch.history)
    states = loss.backbone(history)[-1]
    scores = loss.task.head.queries(states, states) @ loss.backbone.table[1:].T + loss.task.head.bias
    examples = dataset.sequences("train", 4)
    for row, (user, place) in enumerate(rows_of(history)):
        window = batch.index[user]
        begin = dataset.offsets[examples.user[window]]
        before = int(examples.cut[window]) - int(batch.history.lengths[user])
        held = dataset.items[begin : begin + before + place + 1].astype(np.int64)
        scores[row, held - 1] = -torch.inf
    torch.testing.assert_close(loss(batch), torch.nn.functional.cross_entropy(scores, target.long() - 1))


def rows_of(history):
    """(user, place in the history) of each row."""
    return [(user, place) for user, length in enumerate(history.lengths.tolist()) for place in range(length)]


@pytest.mark.parametrize("max_len", [4, 20])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_sample_of_every_item_once_is_the_exact_softmax(dataset, repeats, max_len):
    exact, sampled, batch = exact_and_sampled(dataset, repeats, max_len=max_len)
    sampled.sampler = lambda: (torch.arange(1, 51), torch.zeros(50))
    (value, gradients), (want, exact_gradients) = loss_and_gradients(sampled, batch), loss_and_gradients(exact, batch)
    torch.testing.assert_close(value, want)
    for got, gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("repeats", [True, False])
def test_the_sampled_softmax_with_many_draws_is_the_exact_one(dataset, repeats):
    """Loss and gradient: the estimate under the softmax is unbiased, so 200,000 draws come within a percent."""
    exact, sampled, batch = exact_and_sampled(dataset, repeats, negatives=200_000)
    (value, gradients), (want, exact_gradients) = loss_and_gradients(sampled, batch), loss_and_gradients(exact, batch)
    assert abs(value - want) < 0.01 * want
    for got, gradient in zip(gradients, exact_gradients, strict=True):
        assert (got - gradient).norm() < 0.03 * gradient.norm()


def test_a_sampled_step_touches_the_rows_it_reads(dataset):
    _, loss, batch = exact_and_sampled(dataset, False)
    table = loss.backbone.table
    before = table.detach().clone()
    optimizer = adamw([{"params": loss.backbone.parameters(), "lr": 0.1}], PretrainConfig(), 1)
    torch.manual_seed(3)
    loss(batch).backward()
    assert table.grad.is_sparse
    touched = table.grad.coalesce().indices()[0]
    torch.manual_seed(3)
    drawn = loss.sampler()[0]
    assert set(touched.tolist()) == set(batch.history.items.tolist()) | set(drawn.tolist())
    optimizer.step()
    assert (table != before).any(1).nonzero()[:, 0].tolist() == touched.tolist()


@pytest.mark.parametrize("kind", [{"kind": "nextitnet"}, {"positions": "rotary"}], ids=str)
def test_every_kind_of_backbone_learns(dataset, kind):
    torch.set_num_threads(1)
    shape = BackboneConfig(dataset.num_items, **BACKBONE, **kind)
    model, curve = pretrain(dataset, shape, PretrainConfig(epochs=3, batch_tokens=256))
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert not hasattr(model.backbone, "position")
    curve = learn_task(model, dataset, "click", LearnConfig(epochs=3, batch_tokens=256))
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_settings_of_the_start_are_checked():
    with pytest.raises(ValueError, match=r"ridge must be a list of strengths above 0, got \(0,\)"):
        LearnConfig(ridge=(0,))
    with pytest.raises(ValueError, match="ridge_rate must be a number above 0, got 0"):
        LearnConfig(ridge=(1,), ridge_rate=0)


def test_a_task_that_was_not_learned_to_its_end_is_not_in_the_model(dataset, pretrained, tmp_path):
    def stop(*args, **named):
        raise KeyboardInterrupt

    model, config = copy.deepcopy(pretrained), LearnConfig(epochs=1)
    with mock.patch("pcl_ext.loop._step", stop), pytest.raises(KeyboardInterrupt):
        learn_task(model, dataset, "click", config)
    assert model.task_names == ["next"]
    with pytest.raises(FileNotFoundError, match="the folder of the checkpoint"):
        learn_task(model, dataset, "click", config, checkpoint=tmp_path / "missing" / "click.safetensors")
    learn_task(model, dataset, "click", config, checkpoint=tmp_path / "click.safetensors")
    assert model.task_names == ["next", "click"]


def test_batches_with_many_scores_hold_few_users(dataset, pretrained, monkeypatch):
    columns, users = dataset.task("range").spec.num_outputs(dataset.num_items), []
    monkeypatch.setattr(infer, "MOST_SCORES", 5 * columns)
    model, outputs = copy.deepcopy(pretrained), UserModel.member_outputs
    with mock.patch.object(UserModel, "member_outputs", autospec=True) as read:
        read.side_effect = lambda model, history, name: (users.append(len(history)), outputs(model, history, name))[1]
        learn_task(model, dataset, "range", LearnConfig(epochs=1, ridge=()))
    assert max(users) == 5
    assert sum(users) == len(dataset.examples("range", "train"))


def test_fit_head_leaves_the_mode_as_it_is(dataset, pretrained):
    model = copy.deepcopy(pretrained)
    model.add_task(dataset.task("click").spec)
    for training in (True, False):
        model.train(training)
        infer.fit_head(model, dataset, "click")
        assert model.training == model.task("click").training == training
