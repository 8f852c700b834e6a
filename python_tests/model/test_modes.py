"""Training and evaluation mode: what is closed stays in evaluation, and predicting leaves every mode as it was."""

import pytest
import torch
from model_cases import V, add, histories, make_model
from torch import nn

from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone, BackboneConfig, UserModel, UserState


@pytest.mark.parametrize("ask", ["model", "tasks", "task", "other", "whole"])
def test_a_closed_task_stays_in_evaluation_mode(model, ask):
    task = add(model, "click", "none", readout=("item_memory",))
    add(model, "age")
    model.freeze_task("click")
    whole = nn.ModuleList([model])
    asked = {"model": model, "tasks": model.tasks, "task": task, "other": model.task("age"), "whole": whole}[ask]
    asked.train()
    assert not any(part.training for part in task.modules())
    assert all(part.training for part in model.task("age").modules()) == (ask != "task")
    assert not any(part.training for part in model.backbone.modules())


def test_predicting_leaves_every_mode_as_it_was(model):
    add(model, "click")
    add(model, "age")
    model.train()
    model.task("age").eval()
    model.task("click").dropout.eval()
    before = {name: part.training for name, part in model.named_modules()}
    model.predict(histories(), "click")
    assert {name: part.training for name, part in model.named_modules()} == before
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.predict(histories(), "click", k=0)
    assert {name: part.training for name, part in model.named_modules()} == before


def test_what_is_frozen_in_inference_mode_may_be_learned_beside():
    model = UserModel(Backbone(BackboneConfig(V, dim=16, max_len=20)))
    add(model, "click", "prefix")
    with torch.inference_mode():
        model.freeze_backbone()
        model.freeze_task("click")
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_inference()]


def test_another_default_device_is_no_matter():
    model, given = make_model(positions="rotary"), histories()
    for name in ("click", "age"):
        add(model, name, "tail", readout=("last", "mean", "item_memory"))

    def use():
        batch = PackedBatch.from_lists(given, num_items=V, max_len=20)
        state = model.user_state(batch)
        state.extend(batch)
        again = UserState.from_tensors(model.backbone, state.tensors())
        mixed = model(batch, task_index=torch.tensor([0, 1] * 3, device="cpu"))
        return model.predict(given, "age"), mixed, model(again, "click")

    answers, mixed, of_state = use()
    with torch.device("meta"):
        there = use()
    assert there[0] == answers
    assert torch.equal(there[2], of_state)
    for name, parts in mixed.items():
        assert all(map(torch.equal, there[1][name], parts))
