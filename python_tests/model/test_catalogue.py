"""The catalogue of an items task: which columns its targets are, and that none of it is saved."""

import pytest
import torch
from test_user_model import SPECS, V, add, model  # noqa: F401 (a fixture)

from pcl_ext import TaskSpec, task_loss
from pcl_ext.model.catalogue import Catalogue


def test_nothing_of_it_is_saved(model):  # noqa: F811
    task = add(model, "rank")
    assert task.catalogue.tolist() == list(range(5, 25))
    assert not any("ranked" in name or "column" in name for name in task.state_dict())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_columns_of_targets(dtype):
    catalogue = Catalogue(TaskSpec("some", "items", catalogue=(9, 2, 40)), V)
    assert catalogue.columns(torch.tensor([40, 9, 2, 9], dtype=dtype)).tolist() == [2, 0, 1, 0]
    assert catalogue.columns(torch.tensor([], dtype=dtype)).tolist() == []


EVERYTHING = TaskSpec("all", "items")
NO_ITEMS = [(spec, item) for spec in (SPECS["rank"], EVERYTHING) for item in (-100, -1, 0, V + 1, -V, 2**40)]


@pytest.mark.parametrize(("spec", "item"), [*NO_ITEMS, (SPECS["rank"], 3)], ids=lambda x: getattr(x, "name", x))
def test_what_is_no_item_is_named(spec, item):
    catalogue = Catalogue(spec, V)
    with pytest.raises(ValueError, match=f"targets of task '{spec.name}' must be in its catalogue, got item {item}$"):
        catalogue.columns(torch.tensor([7, item, 8]))


def test_a_column_that_is_none_makes_the_loss_nan():
    """On CUDA nobody looks at the targets, and an index below 0 counts from the end."""
    output, rows = torch.randn(3, 20), torch.arange(3)
    assert task_loss(SPECS["rank"], output, torch.tensor([4, 19, 0]), rows).isfinite()
    assert task_loss(SPECS["rank"], output, torch.tensor([4, -1, 0]), rows).isnan()
