"""Learning an items task over a sample of a large catalogue: what the sample stands for, what a step touches."""

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from runs import BACKBONE

from pcl_ext import PackedBatch, loop, train
from pcl_ext.data import Dataset, Examples
from pcl_ext.data.loader import ExampleBatch
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.sampled_items import SampledItemsLoss
from pcl_ext.task import TaskSpec
from pcl_ext.train import LearnConfig, adamw, learn_task, task_rates

HISTORIES = [[3, 9, 4, 40, 17, 6, 9], [12], [], [50, 21, 2, 33, 8, 45]]  # the model reads 4
TARGETS = [[5, 22], [13], [18, 30, 7], []]
REPEATED = [[5, 4], [13, 12], [18, 30, 7], [33]]  # of a task with repeats: 4, 12 and 33 are in the history
SPECS = {
    "all": TaskSpec("all", "items"),
    "some": TaskSpec("some", "items", catalogue=tuple(range(45, 2, -1))),
    "again": TaskSpec("again", "items", repeats=True),
    "some again": TaskSpec("some-again", "items", catalogue=tuple(range(45, 2, -1)), repeats=True),
}


def made(name, tied, negatives=5):
    """The sampled loss of an open task of an untrained model, and a batch with several targets a user and none."""
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(50, **{**BACKBONE, "max_len": 4})))
    model.freeze_backbone()
    task = model.add_task(SPECS[name], MemoryConfig(prompt_len=2, tied=tied))
    votes = [] if task.repeats is None else list(task.repeats.parameters())
    for parameter in (task.head.bias, task.head.project.weight, *votes):
        torch.nn.init.normal_(parameter, std=0.3)
    history, targets = PackedBatch.from_lists(HISTORIES, num_items=50, max_len=4), REPEATED if votes else TARGETS
    target = torch.tensor([item for items in targets for item in items])
    rows = torch.repeat_interleave(torch.arange(4), torch.tensor([len(items) for items in targets]))
    examples = Examples(*(torch.arange(4),) * 2, torch.arange(5), target)
    loss = SampledItemsLoss(model.train(), task, examples, negatives)
    return loss, ExampleBatch(history, target, rows, torch.arange(4))


def loss_and_gradients(task, loss):
    gradients = torch.autograd.grad(loss, list(task.parameters()))
    return loss.detach(), [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]


def exact(loss, batch):
    """What is learned below the threshold."""
    task = loss.task
    scores = loss.model(batch.history, task.spec.name)
    return loss_and_gradients(task, task.loss(scores, task.columns(batch.target), batch.target_row))


CASES = [(name, tied) for name in SPECS for tied in (True, False)]


@pytest.fixture(autouse=True)
def without_dropout():
    """The same features in every pass."""
    with mock.patch("torch.nn.functional.dropout", lambda x, *_, **__: x):
        yield


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_a_sample_of_every_column_once_is_the_exact_softmax(name, tied):
    loss, batch = made(name, tied)
    columns = len(loss.task.catalogue)
    loss.sampler = lambda: (torch.arange(columns) + 1, torch.zeros(columns))
    value, gradients = loss_and_gradients(loss.task, loss(batch))
    want, exact_gradients = exact(loss, batch)
    torch.testing.assert_close(value, want)
    for got, gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_with_many_draws_it_is_the_exact_softmax(name, tied):
    """The estimate under the softmax is unbiased: 200,000 draws come within a percent."""
    loss, batch = made(name, tied, negatives=200_000)
    (value, gradients), (want, exact_gradients) = loss_and_gradients(loss.task, loss(batch)), exact(loss, batch)
    assert abs(value - want) < 0.01 * want
    for got, gradient in zip(gradients, exact_gradients, strict=True):
        assert (got - gradient).norm() <= 0.03 * gradient.norm()


def test_items_are_drawn_as_often_as_they_are_targets():
    loss, _ = made("some", True)
    counts = torch.bincount(loss.task.columns(torch.tensor(sum(TARGETS, []))), minlength=43)
    weights = (counts + 1.0) ** 0.75
    torch.testing.assert_close(loss.sampler.log_expected, (weights / weights.sum() * 5).log())


def test_what_a_history_holds_is_chosen_among_whatever_is_drawn():
    """Nothing drawn: a target against its own history's items, with their votes, and itself."""
    loss, batch = made("again", True)
    loss.sampler = lambda: (torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    value, _ = loss_and_gradients(loss.task, loss(batch))
    scores, target = loss.model(batch.history, "again"), loss.task.columns(batch.target)
    logs = []
    for column, row in zip(target.tolist(), batch.target_row.tolist()):
        held = {item - 1 for item in HISTORIES[row][-4:]} | {column}
        logs.append(scores[row, sorted(held)].logsumexp(0) - scores[row, column])
    torch.testing.assert_close(value, torch.stack(logs).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_moves_the_rows_that_it_scores(tied):
    loss, batch = made("some", tied)
    task = loss.task
    optimizer = adamw(task_rates(task, LearnConfig()), LearnConfig(), 1)
    torch.manual_seed(3)
    loss(batch).backward()
    assert loss.model.backbone.table.grad is None
    if tied:
        return
    torch.manual_seed(3)
    scored = set((loss.sampler()[0] - 1).tolist()) | set(task.columns(batch.target).tolist())
    assert len(scored) < len(task.catalogue)
    assert task.head.rows.grad.is_sparse
    before = task.head.rows.detach().clone()
    optimizer.step()
    assert (task.head.rows != before).any(1).nonzero()[:, 0].tolist() == sorted(scored)


def learn(pretrained, dataset, checkpoint=None, memory=None, **settings):
    """-> the curve without clocks, and what the task has stored."""
    torch.set_num_threads(1)
    model, config = copy.deepcopy(pretrained), LearnConfig(epochs=4, batch_tokens=300, ridge=(), **settings)
    curve = learn_task(model, dataset, "range", config, memory, checkpoint)
    return [{**entry, "seconds": 0} for entry in curve], model.task("range").state_dict()


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][key], other[1][key]) for key in one[1])


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_catalogue_is_learned_from_a_sample(dataset, pretrained, tied):
    curve, _ = learn(pretrained, dataset, memory=MemoryConfig(tied=tied), full_softmax=1, negatives=20)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["valid_loss"] < curve[0]["valid_loss"]


def test_at_the_threshold_nothing_is_drawn(dataset, pretrained):
    columns = len(dataset.task("range").spec.catalogue)
    with mock.patch.object(train, "SampledItemsLoss", side_effect=AssertionError):
        whole = learn(pretrained, dataset)
        assert same(learn(pretrained, dataset, full_softmax=columns), whole)
    assert not same(learn(pretrained, dataset, full_softmax=columns - 1), whole)


def test_a_task_with_repeats_is_learned_from_a_sample_too(dataset, pretrained):
    model, task = copy.deepcopy(pretrained), dataset.task("range")
    again = dataclasses.replace(task, spec=dataclasses.replace(task.spec, repeats=True))
    settings = LearnConfig(epochs=4, batch_tokens=300, ridge=(), full_softmax=1, negatives=20)
    with (
        mock.patch.object(train, "SampledItemsLoss", wraps=SampledItemsLoss) as made,
        mock.patch.object(Dataset, "task", return_value=again),
    ):
        curve = learn_task(model, dataset, "range", settings)
    assert made.called
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_it_resumes_with_the_same_bits(dataset, pretrained, tmp_path):
    settings = {"full_softmax": 1, "negatives": 20, "checkpoint_seconds": 0}
    whole, take, done = learn(pretrained, dataset, **settings), loop._step, []

    def interrupted(*args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(None)
        return take(*args)

    with mock.patch.object(loop, "_step", interrupted), pytest.raises(KeyboardInterrupt):
        learn(pretrained, dataset, tmp_path / "range.safetensors", **settings)
    assert same(learn(pretrained, dataset, tmp_path / "range.safetensors", **settings), whole)


@pytest.mark.parametrize("name", ["full_softmax", "negatives"])
def test_the_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 up, got 0"):
        LearnConfig(**{name: 0})


@pytest.mark.parametrize("targets", [1, 50])
def test_a_batch_with_repeats_has_so_many_examples_that_its_scores_are_held(targets, monkeypatch):
    monkeypatch.setattr(train.infer, "MOST_SCORES", 1 << 20)
    config, count = LearnConfig(negatives=500, batch_tokens=700), 400
    examples = Examples(
        *(torch.arange(count),) * 2, torch.arange(count + 1) * targets, torch.zeros(count * targets, dtype=torch.int64)
    )
    most = train._most_with_repeats(examples, config)
    scores = [n * targets * (500 + 700 + n * targets) for n in (most, most + 1)]
    assert scores[0] <= 1 << 20 < scores[1]
