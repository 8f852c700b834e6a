"""What training refuses of a dataset, and which of its items a backbone then knows."""

import logging

import numpy as np
import pytest
import torch
from runs import BACKBONE, write_dataset

from pcl_ext import train
from pcl_ext.data import Dataset, DatasetWriter, fold_of
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig
from pcl_ext.next_item import item_counts
from pcl_ext.task import TaskSpec
from pcl_ext.train import LearnConfig, PretrainConfig, learn_task, pretrain


def test_a_table_whose_targets_can_be_seen_is_refused(tmp_path):
    users, items = np.arange(300), np.random.default_rng(0).permuted(np.tile(np.arange(1, 21), (300, 1)), axis=1)[:, :6]
    with DatasetWriter(tmp_path / "leaks", "leaks", 20) as writer:
        writer.histories(users, items.ravel(), np.arange(301) * 6, fold_of("leaks", users))
        writer.task(TaskSpec("leak", "items"), users, items[:, 0], [6] * 300)
    leaky = Dataset(tmp_path / "leaks")
    model, _ = pretrain(leaky, BackboneConfig(20, **BACKBONE), PretrainConfig(epochs=1))
    with pytest.raises(ValueError, match="target must not be among the first 6 items"):
        learn_task(model, leaky, "leak")
    assert model.task_names == ["next"]


def test_pretraining_refuses_repeats_that_the_dataset_rules_out(tmp_path):
    users = np.arange(300)
    with DatasetWriter(tmp_path / "again", "again", 5) as writer:
        writer.histories(users, np.tile([3, 1, 3], 300), np.arange(301) * 3, fold_of("again", users))
    (tmp_path / "again" / "tasks").mkdir(exist_ok=True)
    (tmp_path / "again" / "tasks" / "next.json").write_text('{"name": "next", "kind": "items", "repeats": false}')
    with pytest.raises(ValueError, match="does not say repeats"):
        pretrain(Dataset(tmp_path / "again"), BackboneConfig(5, **BACKBONE), PretrainConfig(epochs=1))


@pytest.mark.parametrize("full_softmax", [100, 2000], ids=["sampled", "exact"])
def test_items_that_no_step_has_read_are_not_trained(tmp_path, full_softmax):
    users, count = np.arange(1000), 2000
    items = np.random.default_rng(0).integers(1, count + 1, 10_000)
    with DatasetWriter(tmp_path / "long", "long", count) as writer:
        writer.histories(users, items, np.arange(1001) * 10, fold_of("long", users))
    dataset, shape = Dataset(tmp_path / "long"), BackboneConfig(count, **BACKBONE)
    config = PretrainConfig(epochs=2, epoch_tokens=512, batch_tokens=512, full_softmax=full_softmax, negatives=32)
    model, _ = pretrain(dataset, shape, config)
    torch.manual_seed(config.seed)
    moved = (model.backbone.table != Backbone(shape).table).any(1)
    known = model.backbone.trained_items
    assert 0 < known.sum() <= 2 * 512
    assert moved[known].all()
    whole, _ = pretrain(dataset, shape, PretrainConfig(epochs=1, full_softmax=full_softmax, negatives=32))
    assert torch.equal(whole.backbone.trained_items, item_counts(dataset) > 0)


def test_the_log_says_what_a_large_dataset_leaves_to_other_epochs_and_what_own_rows_cost(tmp_path, caplog):
    dataset = Dataset(write_dataset(tmp_path / "dataset"))
    with caplog.at_level(logging.INFO, "pcl_ext.train"):
        settings = {"epochs": 1, "batch_tokens": 300}
        model, _ = pretrain(dataset, BackboneConfig(dataset.num_items, **BACKBONE), PretrainConfig(**settings))
        assert caplog.messages == []
        model.backbone.trained_items[1:] = True
        model.backbone.trained_items[7] = False
        learn_task(model, dataset, "click", LearnConfig(**settings, epoch_tokens=600))
        spec, memory = TaskSpec("buy", "items"), MemoryConfig(tied=True)
        for config in (memory, MemoryConfig(), MemoryConfig(readout=("last", "item_memory"))):
            train._say_rows(model.add_task(spec, config), model)
            model.remove_task("buy")
    events = int(dataset.examples("click", "train").cut.clamp(1, 20).sum())
    assert [text.partition(", others")[0] for text in caplog.messages[:1]] == [
        f"click: an epoch reads 600 of {events:,} events"
    ]
    assert len(caplog.messages) == 3
    assert caplog.messages[1].startswith("buy: 1 of its 50 items were not trained in pretraining")
