"""Any task name of the contract works, those of a module's own attributes too."""

import copy

import pytest
import torch
from model_cases import histories, pack
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.func import functional_call

from pcl_ext import MemoryConfig, TaskSpec
from pcl_ext.store import from_pretrained, save_pretrained

# what a module has; what it may have; what it has not
NAMES = [
    "items",
    "train",
    "training",
    "keys",
    "values",
    "forward",
    "type",
    "pop",
    "get",
    "_modules",
    "__class__",
    "_x",
    "a-b",
]


def add(model, name):
    task = model.add_task(TaskSpec(name, "binary"), MemoryConfig(prompt_len=3, dropout=0.0))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(0, 0.5)
    return task


@pytest.fixture(params=NAMES)
def named(request, model):
    """A model with a task of that name, between two others, and the name."""
    for name in ("click", request.param, "age"):
        add(model, name)
    return model.train().eval(), request.param


def test_it_is_found_by_its_name(named):
    model, name = named
    assert model.task_names == list(model.tasks.keys()) == ["click", name, "age"]
    assert [task.spec.name for task in model.tasks.values()] == [key for key, _ in model.tasks.items()]
    assert name in model.tasks
    assert None not in model.tasks
    assert len(model.tasks) == 3
    assert model.task(name).spec.name == name
    model.remove_task(name)
    assert model.task_names == ["click", "age"]
    assert name not in model.tasks


def test_what_takes_modules_apart_and_together_works(named):
    model, name = named
    batch = pack(histories())
    want = model(batch, name)
    for parameter_name, parameter in model.named_parameters():
        assert model.get_parameter(parameter_name) is parameter
    assert torch.equal(functional_call(model, dict(model.named_parameters()), (batch, name)), want)
    assert torch.equal(torch.optim.swa_utils.AveragedModel(model)(batch, name), want)
    assert torch.equal(copy.deepcopy(model)(batch, name), want)
    assert get_model_state_dict(model).keys() == model.state_dict().keys()
    model.load_state_dict(model.state_dict())


def test_it_is_closed_saved_and_loaded(named, tmp_path):
    model, name = named
    for each in model.task_names:
        model.freeze_task(each)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.task_names == model.task_names
    assert loaded.predict(histories(), name) == model.predict(histories(), name)


def test_other_names_are_their_own_in_the_state_dict(model):
    task = add(model, "click")
    names = {f"tasks.click.{name}" for name in task.state_dict()}
    assert names == {name for name in model.state_dict() if name.startswith("tasks.")}
    assert {"memories.tail.rows", "memories.item_memory.table"} <= task.state_dict().keys()
