"""Targets are new items: what a history holds comes last, also what lies before the events that are read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_cases import PLACEMENTS, SPECS, add, histories, pack

from pcl_ext import Backbone, BackboneConfig, MemoryConfig, TaskSpec, UserModel, infer
from pcl_ext.data import Dataset, DatasetWriter
from pcl_ext.model.catalogue import SEEN_SCORE
from pcl_ext.model.many_tasks import encode_each

LENGTHS = [5, 0, 30, 60, 20]  # the model reads 20


def add_items(model, placement="tail"):
    """Items tasks with a prompt and without, among others; nothing reads what is older."""
    add(model, "rank", placement, whole_history=False)
    add(model, "click", "tail")
    add(model, "age", "none")


def check(task, output, lists):
    """Every item of the lists, and no other, scores SEEN_SCORE."""
    for row, history in zip(output, lists, strict=True):
        last = torch.isin(task.catalogue, torch.tensor(history, dtype=torch.int64))
        assert torch.equal(row == SEEN_SCORE, last)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_all_of_a_history_comes_last(model, placement, training):
    add_items(model, placement)
    lists, task = histories(LENGTHS), model.train(training).task("rank")
    batch = pack(lists)
    output = model(batch, "rank")
    check(task, output, lists)
    check(task, model.member_outputs(batch, "rank")[0], lists)
    if not training:
        read = model(replace(batch, older=None), "rank")
        assert torch.equal(output, torch.where(output == SEEN_SCORE, output, read))
        check(task, read, [history[-20:] for history in lists])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_in_a_batch_that_mixes_tasks(model, placement):
    add_items(model, placement)
    lists = histories(LENGTHS)
    rows, output = model(pack(lists), task_index=torch.tensor([1, 0, 0, 0, 2]))["rank"]
    assert rows.tolist() == [1, 2, 3]
    check(model.task("rank"), output, lists[1:4])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_where_several_tasks_share_a_pass(model, placement):
    add_items(model, placement)
    lists = histories(LENGTHS)
    shared = dict(encode_each(model.backbone, pack(lists), dict(model.tasks.items())))
    check(model.task("rank"), model.task("rank")(shared["rank"], model.backbone.table), lists)


def test_predictions_of_plain_lists(model):
    add_items(model)
    (history,) = histories([60])
    new = set(SPECS["rank"].catalogue) - set(history)
    assert 0 < len(new) < 20
    items = model.predict([history], "rank", k=20)[0]["items"]
    assert set(items[: len(new)]) == new


def test_votes_are_those_of_what_is_read(model):
    spec = TaskSpec("again", "items", repeats=True)
    task = model.add_task(spec, MemoryConfig(whole_history=False))
    torch.nn.init.normal_(task.repeats.vote.weight)
    batch = pack(histories(LENGTHS))
    assert torch.equal(model(batch, "again"), model(replace(batch, older=None), "again"))


@pytest.mark.parametrize("placement", ["none", "tail"])
def test_measured_on_a_dataset(tmp_path, placement):
    """Histories of all items, in some order: with the last one as target there is nothing else to choose."""
    users, items = 30, 12
    lists = np.stack([np.random.default_rng(user).permutation(items) + 1 for user in range(users)])
    with DatasetWriter(tmp_path / "all", "all", items) as writer:
        offsets = np.arange(users + 1) * items
        writer.histories(np.arange(users), lists.flatten(), offsets, np.arange(users) % 3)
    dataset = Dataset(tmp_path / "all")
    made = UserModel(Backbone(BackboneConfig(items, dim=8, max_len=5)))
    made.freeze_backbone()
    made.add_task(TaskSpec("next", "items"), MemoryConfig(placement=placement))
    scores = infer.evaluate(made, dataset, ["next"])["next"]
    assert scores.count == 10
    assert scores.metrics["mrr@5"] == 1.0


def test_in_float16_what_is_seen_has_its_lowest_number(model):
    add(model, "rank", "none", tied=True)
    model.half()
    with torch.no_grad():
        output = model(pack(histories()), "rank")
    lowest = torch.finfo(torch.float16).min
    for history, row in zip(histories(), output):
        seen = torch.isin(model.task("rank").catalogue, torch.tensor(history))
        assert torch.equal(row == lowest, seen)
        assert row.isfinite().all()
