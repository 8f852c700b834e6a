"""DistributedDataParallel around a task: every parameter has its part in every step, and the gradients are its own."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pcl_ext import Backbone, BackboneConfig, MemoryConfig, PackedBatch, TaskSpec, UserModel, task_loss

V, MAX_LEN = 30, 8
TARGETS = {
    "items": torch.tensor([3, 7, 29]),
    "binary": torch.tensor([0, 1, 0]),
    "classes": torch.tensor([2, 0, 1]),
    "regression": torch.tensor([0.5, -1.0, 2.0]),
}
SETTINGS = [
    {},
    {"placement": "prefix"},
    {"placement": "both"},
    {"placement": "layers"},
    {"contextual": "texts"},
    {"contextual": "prompts"},
    {"placement": "none", "readout": ("earlier", "pooled")},
    {"low_rank": 2},
]
CASES = [(kind, settings) for kind in TARGETS for settings in SETTINGS]
CASES += [(kind, {"members": 2}) for kind in TARGETS if kind != "items"]


class Learn(nn.Module):
    """What a trainer is given: a module whose forward is the loss of a task."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, batch, target):
        spec = self.model.task(self.name).spec
        rows = torch.arange(len(target))
        return task_loss(spec, self.model(batch, self.name), self.model.task(self.name).columns(target), rows)


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def learn(kind, settings, earlier):
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(V, dim=16, max_len=MAX_LEN)))
    model.freeze_backbone()
    for name, placement in zip(earlier, ("tail", "none")):
        model.add_task(TaskSpec(name, "binary"), MemoryConfig(placement=placement, prompt_len=4))
        model.freeze_task(name)
    spec = TaskSpec("new", kind, num_classes=3 if kind == "classes" else None)
    model.add_task(spec, MemoryConfig(prompt_len=4, dropout=0.0, item_dropout=0.0, **settings))
    return Learn(model.train(), "new")


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
@pytest.mark.parametrize("earlier", [("first", "second"), ()], ids=["after two tasks", "the first task"])
def test_every_parameter_of_a_task_takes_part(kind, settings, earlier):
    module, twin = learn(kind, settings, earlier), learn(kind, settings, earlier)
    parallel = DistributedDataParallel(module, find_unused_parameters=False)
    for histories in ([[1, 2, 5], [], [9] * 12], [[], [], []]):  # a share without an event too
        batch = PackedBatch.from_lists(histories, num_items=V, max_len=MAX_LEN)
        parallel.zero_grad()
        parallel(batch, TARGETS[kind]).backward()  # raises where the step before left a parameter out
        twin.zero_grad()
        twin(batch, TARGETS[kind]).backward()
        for (name, parameter), own in zip(twin.named_parameters(), module.parameters()):
            torch.testing.assert_close(own.grad, parameter.grad, rtol=0, atol=0, msg=name)
    parallel(batch, TARGETS[kind])


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("kind", ["transformer", "nextitnet"])
def test_single_parts_of_a_layer_may_be_sharded(kind):
    """Their weights are whole only while they are called."""
    backbone = Backbone(BackboneConfig(V, dim=16, max_len=MAX_LEN, dropout=0.0, kind=kind))
    twin, batch = deepcopy(backbone), PackedBatch.from_lists([[1, 2, 5], [], [9] * 12], num_items=V, max_len=MAX_LEN)
    for part in backbone.layers[0].children():
        if list(part.parameters()):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    for module in (backbone, twin):
        module(batch)[-1].square().sum().backward()
    for sharded, parameter in zip(backbone.parameters(), twin.parameters()):
        own = sharded.grad.full_tensor() if isinstance(sharded, DTensor) else sharded.grad
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-5)
