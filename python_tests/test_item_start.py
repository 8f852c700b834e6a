"""The closed-form start of an items task with a cold catalogue."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from pcl_ext import item_start, progress
from pcl_ext.data import Examples, make_batch
from pcl_ext.item_start import start_items
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel


def bags_of(memory, history):
    """[B, rows of its table]: how much of each row a history's item memory adds up."""
    index, offsets, weights = memory.bags(history)
    user = torch.repeat_interleave(offsets.diff())
    bags = torch.zeros(len(history), len(memory.table))
    return bags.index_put_((user, index.long()), weights, accumulate=True)


@pytest.mark.parametrize("most_all", [1, 65_536])  # 1: over targets alone, as of a large catalogue
@pytest.mark.parametrize(
    ("item_rows", "strengths", "max_len"),
    [(1000, (3.0,), 20), (40, (3.0,), 20), (1000, (100.0, 3.0, 0.5), 20), (1000, (3.0,), 4)],
)
def test_a_cold_catalogue_starts_at_a_ridge_regression(dataset, item_rows, strengths, max_len, most_all, monkeypatch):
    """At a width that W fits into, scores are one factor times those of the dense formula; a score picks among
    several strengths: here the second. All of a history is read, also where the backbone reads the newest 4 events."""
    model = UserModel(Backbone(BackboneConfig(dataset.num_items, dim=16, max_len=max_len))).eval()
    model.freeze_backbone()
    config = MemoryConfig(placement="none", item_width=60, item_rows=item_rows)
    task = model.add_task(dataset.task("range").spec, config).eval()
    assert task.cold
    monkeypatch.setattr(item_start, "_MOST_ALL", most_all)
    torch.manual_seed(0)
    scores = iter([0.1, 0.3, 0.2])
    start_items(model, dataset, "range", strengths, lambda: next(scores))
    examples = dataset.examples("range", "train")
    batch = make_batch(dataset, examples, torch.arange(len(examples)), max_len)
    memory, columns, n = task.memories["item_memory"], len(task.catalogue), len(examples)
    eye = bags_of(memory, batch.history).double()
    y = torch.zeros(n, columns).double()
    y.index_put_((batch.target_row, task.columns(batch.target)), torch.ones(len(batch.target)).double(), True)
    ridge = torch.linalg.solve(eye.T @ eye + 3.0 * torch.eye(eye.shape[1]), eye.T @ (y - y.mean(0)))
    want = eye @ ridge + y.mean(0)
    got = model(batch.history, "range").double()
    listed = got > -1e8  # not what the history holds
    factor = (got[listed] * want[listed]).sum() / want[listed].square().sum()
    assert factor > 0.5
    assert (got - factor * want)[listed].norm() < 0.02 * got[listed].norm()


@pytest.mark.parametrize("held", [1, 7, 200])
def test_the_factor_of_a_start_is_judged_on_many_users(monkeypatch, held):
    """Of a large catalogue some users at a time: the first 20 alone want large scores, all of 200 do not."""
    read, right, means = torch.randn(200, 4), torch.randn(4, 30), torch.zeros(30)
    row, column = torch.arange(200), torch.randint(30, (200,))
    column[:20] = (read @ right)[:20].argmax(1)
    column[20:110] = (read @ right)[20:110].topk(2).indices[:, 1]

    def loss(factor, users):
        return torch.nn.functional.cross_entropy((read @ right * factor)[:users], column[:users])

    want, few = (min(item_start._SCALES, key=lambda factor: loss(factor, users)) for users in (200, 20))
    assert want != few
    monkeypatch.setattr(item_start, "_MOST_SCORES", held * 30)
    assert item_start._factor(read, right, means, (row, column)) == want


def test_the_factor_of_the_start_is_fitted_on_users_of_any_length(monkeypatch):
    """Those of the first rows, which are the longest histories, want the least; a few of the others are drawn too."""
    torch.manual_seed(0)
    count, columns = 1000, 50
    target = torch.randint(columns, (count,))
    read = torch.nn.functional.one_hot(target, columns).float() * 0.2
    read[:100] *= -1  # their own target ranks last
    monkeypatch.setattr(item_start, "_MOST_SCORES", 1)
    monkeypatch.setattr(item_start, "_FEWEST_USERS", 100)
    factor = item_start._factor(read, torch.eye(columns), torch.zeros(columns), (torch.arange(count), target))
    assert factor > 1


def test_columns_that_nobody_has_as_a_target_count_without_being_held():
    """A factor over targets alone is that over the whole catalogue, another one than where the rest is forgotten."""
    torch.manual_seed(0)
    rows, column = torch.randn(50, 16), torch.randint(0, 50, (1000,))
    read, user = rows[column] * 0.05 + torch.randn(1000, 16) * 0.1, torch.arange(1000)
    right, means = rows.T * 0.3, torch.rand(50) / 100
    whole = (torch.cat([right, torch.zeros(16, 2950)], 1), torch.cat([means, torch.zeros(2950)]))
    want = item_start._factor(read, *whole, (user, column))
    assert item_start._factor(read, right, means, (user, column), 2950) == want
    assert item_start._factor(read, right, means, (user, column)) != want


def test_scores_of_a_large_catalogue_are_held_for_its_targets_alone(dataset, pretrained, monkeypatch):
    model = copy.deepcopy(pretrained)
    model.backbone.trained_items[:] = False
    task = model.add_task(dataset.task("range").spec, MemoryConfig(placement="none"))
    monkeypatch.setattr(item_start, "_MOST_ALL", 1)
    monkeypatch.setattr(item_start, "_MOST_EXAMPLES", 3)
    with mock.patch.object(item_start, "_factor", return_value=2.0) as factor:
        start_items(model, dataset, "range", (3.0,), lambda: 0.0)
    _, right, means, _, zeros = factor.call_args.args
    assert right.shape[1] == len(means) == len(task.catalogue) - zeros < len(task.catalogue)


@pytest.mark.parametrize("hashed", [False, True])
def test_half_of_the_events_are_left_out_the_mean_kept(hashed):
    """An event's two hashed rows go together, other neighbours do not."""
    task = SimpleNamespace(memories={"item_memory": SimpleNamespace(hashed=hashed)})
    left = item_start._half(torch.full((20_000,), 3.0), task)
    assert left.unique().tolist() == [0, 6]
    assert left.mean() == pytest.approx(3, abs=0.15)
    same = (left[::2] == left[1::2]).double().mean()
    assert same == 1 if hashed else abs(same - 0.5) < 0.03
    assert abs((left[1:-1:2] == left[2::2]).double().mean() - 0.5) < 0.03


def test_of_many_examples_some_are_drawn_from_all_of_them(monkeypatch):
    monkeypatch.setattr(item_start, "_MOST_EXAMPLES", 50)
    examples = Examples.without_targets(torch.arange(1000), torch.ones(1000, dtype=torch.int64))
    first, second = (item_start._sample(examples).user.tolist() for _ in range(2))
    assert len(first) == 50
    assert first == sorted(set(first))
    assert first[0] < 200
    assert first[-1] > 800
    assert first != second
    assert item_start._sample(examples.select(torch.arange(50))).user.tolist() == list(range(50))


def test_the_factor_is_split_evenly_between_the_memory_and_the_rows(dataset, pretrained):
    model = copy.deepcopy(pretrained)
    model.backbone.trained_items[:] = False
    task = model.add_task(dataset.task("range").spec, MemoryConfig(placement="none", item_width=8))
    sizes = []
    for factor in (1.0, 9.0):
        torch.manual_seed(0)
        with mock.patch.object(item_start, "_factor", return_value=factor):
            start_items(model, dataset, "range", [3.0], lambda: 0.0)
        sizes.append([part.detach().norm() for part in (task.memories["item_memory"].table, task.head.rows)])
        sizes[-1].append(task.head.bias.detach().norm())
    torch.testing.assert_close(torch.tensor(sizes[1]), torch.tensor(sizes[0]) * torch.tensor([3.0, 3.0, 9.0]))


def test_the_start_of_a_large_catalogue_is_made_of_its_targets(dataset, pretrained, caplog, monkeypatch):
    model = copy.deepcopy(pretrained)
    model.backbone.trained_items[:] = False
    task = model.add_task(dataset.task("range").spec, MemoryConfig(placement="none", item_rows=1000))
    monkeypatch.setattr(item_start, "_MOST_ALL", 1)
    monkeypatch.setattr(item_start, "_MOST_EXAMPLES", 3)
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with mock.patch.object(item_start, "Ridge", wraps=item_start.Ridge) as ridge, caplog.at_level("INFO", "pcl_ext"):
        start_items(model, dataset, "range", (3.0,), lambda: 0.0)
    _, y, _ = ridge.call_args.args
    assert y.shape[1] == int((task.head.bias != 0).sum()) < len(task.catalogue)
    assert "starting range, ridge regressions: 1 of 1 strengths" in caplog.messages
