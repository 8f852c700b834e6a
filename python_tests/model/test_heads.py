"""What a new items task starts from: the frozen item table, or rows of its own."""

import pytest
import torch
from model_cases import SPECS, histories, pack

from pcl_ext.model import MemoryConfig
from pcl_ext.model.catalogue import SEEN_SCORE
from pcl_ext.model.heads import ItemsHead
from pcl_ext.task import TaskSpec


@pytest.mark.parametrize("spec", [SPECS["rank"], TaskSpec("rank", "items")], ids=["some", "all"])
def test_a_new_tied_task_ranks_by_the_newest_state_and_the_item_table(model, spec):
    """Whatever else it reads: that has no weight yet."""
    task, batch = model.add_task(spec, MemoryConfig(tied=True, readout=("mean", "last"))), pack(histories())
    newest = model.backbone(batch)[-1][batch.last_rows] * (batch.lengths > 0)[:, None]
    want = newest @ model.backbone.table[task.catalogue].T
    assert want.abs().max() > 0.1
    for row, history in zip(want, histories()):
        row[torch.isin(task.catalogue, torch.tensor(history))] = SEEN_SCORE
    torch.testing.assert_close(model(batch, "rank"), want)


def test_rows_start_where_the_backbone_has_trained_them_the_others_near_zero():
    table, trained = torch.randn(400, 8), torch.arange(400) % 2 == 0
    head = ItemsHead(table, trained, torch.ones(3, dtype=torch.bool))
    assert torch.equal(head.rows[trained], table[trained])
    assert 0.018 < head.rows[~trained].std() < 0.022


@pytest.mark.parametrize(("known", "cold"), [(10, False), (9, True)])
def test_a_catalogue_is_cold_where_less_than_half_of_it_was_trained(model, known, cold):
    model.backbone.trained_items[: 5 + known] = True  # of 5 to 24
    model.backbone.trained_items[25:] = True
    assert model.add_task(SPECS["rank"]).cold == cold
