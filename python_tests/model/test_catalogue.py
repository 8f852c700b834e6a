"""The catalogue of an items task: which columns its targets are, and what comes last."""

import torch
from test_user_model import add, model  # noqa: F401


def test_nothing_of_it_is_saved(model):  # noqa: F811
    task = add(model, "rank")
    assert task.catalogue.tolist() == list(range(5, 25))
    assert not any("ranked" in name or "column" in name for name in task.state_dict())
    torch.testing.assert_close(task.columns(torch.tensor([24, 5])), torch.tensor([19, 0]))
