"""What training needs before it starts, and what decays."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import BACKBONE, write_dataset

from pcl_ext.data import Dataset
from pcl_ext.model import Backbone, BackboneConfig, UserModel
from pcl_ext.task import TaskSpec
from pcl_ext.train import (
    NEXT,
    LearnConfig,
    NextItemLoss,
    PretrainConfig,
    adamw,
    epoch_batches,
    item_counts,
    learn_task,
    pretrain,
    shift,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset(write_dataset(tmp_path_factory.mktemp("train") / "dataset"))


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


def test_a_backbone_of_another_catalogue_is_refused(dataset):
    with pytest.raises(ValueError, match="must be that of the dataset, got 7 and 50"):
        pretrain(dataset, BackboneConfig(7, **BACKBONE))


def test_biases_do_not_decay_and_long_runs_decay_less(dataset):
    weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    groups = adamw([([weight, bias], 0.1)], LearnConfig(weight_decay=0.5), 4000).param_groups
    assert [(g["params"], g["weight_decay"]) for g in groups] == [([weight], 0.25), ([bias], 0.0)]


@pytest.mark.parametrize("start", [0, 2])
def test_an_epoch_is_bounded_and_starts_anywhere(dataset, start):
    examples, config = dataset.sequences("train", 20), LearnConfig(batch_tokens=100, epoch_tokens=400)
    steps, batches = epoch_batches(dataset, examples, config, 20, 3, start)
    whole = list(epoch_batches(dataset, examples, config, 20, 3, 0)[1])
    assert (steps, len(whole)) == (4, 4)
    for got, want in zip(list(batches), whole[start:], strict=True):
        assert torch.equal(got.index, want.index)
    other = epoch_batches(dataset, examples, config, 20, 4, 0)[1]
    assert not torch.equal(next(other).index, whole[0].index)


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


def exact_and_sampled(dataset, repeats, negatives=5):
    """The two losses of one untrained model, and a batch."""
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(dataset.num_items, dropout=0.0, **BACKBONE)))
    task = model.add_task(TaskSpec("next", "items", repeats=repeats), NEXT)
    torch.nn.init.normal_(task.head.bias)
    batch = next(epoch_batches(dataset, dataset.sequences("train", 20), LearnConfig(batch_tokens=60), 21, 0, 0)[1])
    configs = PretrainConfig(), PretrainConfig(full_softmax=1, negatives=negatives)
    return *(NextItemLoss(model.backbone, task, dataset, config) for config in configs), batch


def loss_and_gradients(loss, batch):
    value = loss(batch)
    gradients = torch.autograd.grad(
        value, [loss.backbone.table, loss.task.head.bias, *loss.backbone.layers.parameters()]
    )
    return value.detach(), [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]


@pytest.mark.parametrize("repeats", [True, False])
def test_a_sample_of_every_item_once_is_the_exact_softmax(dataset, repeats):
    exact, sampled, batch = exact_and_sampled(dataset, repeats)
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
    optimizer = adamw([(list(loss.backbone.parameters()), 0.1)], PretrainConfig(), 1)
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
