"""A model's step on CUDA waits for nothing: whatever the host must know of a batch, it knows before.

Tensors on the device "meta" hold no values, so that whoever wants to read one fails; they go the way of CUDA tensors.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcl_ext import Backbone, BackboneConfig, MemoryConfig, PackedBatch, TaskSpec, UserModel
from pcl_ext.ops import _gpu

V, LENGTHS = 40, [5, 0, 26, 1, 9, 0, 3]  # one longer than what is read
NEW = torch.arange(3, 3 + len(LENGTHS))  # items of no history
SPECS = {
    "items": TaskSpec("items", "items"),
    "some items": TaskSpec("some-items", "items", catalogue=tuple(range(3, 30))),
    "repeats": TaskSpec("repeats", "items", repeats=True),
    "binary": TaskSpec("binary", "binary"),
    "classes": TaskSpec("classes", "classes", num_classes=3),
    "regression": TaskSpec("regression", "regression"),
}
MEMORIES = {
    "tail": {"prompt_len": 4},
    "prefix": {"placement": "prefix", "prompt_len": 5},
    "both": {"placement": "both", "prompt_len": 3},
    "layers": {"placement": "layers", "prompt_len": 3},
    "last": {"placement": "none", "readout": ("last",)},
    "every readout": {"prompt_len": 4, "readout": ("last", "mean", "item_memory", "pooled"), "members": 2},
    "hashed items": {"readout": ("last", "item_memory"), "item_rows": 8},
    "low rank": {"placement": "none", "readout": ("last",), "low_rank": 2},
    "low rank and tail": {"prompt_len": 4, "readout": ("last",), "low_rank": 2},
}
BACKBONES = {
    "transformer": {},
    "rotary": {"positions": "rotary"},
    "nextitnet": {"kind": "nextitnet"},
}
# kind of task, memory, backbone, and whether the backbone learns too
STEPS = [
    *((spec, "tail", "transformer", False) for spec in SPECS),
    *(("binary", memory, "transformer", False) for memory in MEMORIES if memory != "tail"),
    *(("items", memory, "transformer", True) for memory in ("tail", "prefix", "last")),
    *(("binary", memory, "rotary", False) for memory in ("tail", "prefix")),
    *(("binary", memory, "nextitnet", False) for memory in ("tail", "prefix", "layers", "last")),
]


FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class NoNumbersToTheDevice(TorchFunctionMode):
    """Refuses tensors made of Python numbers: the host waits until these are there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = function in FROM_NUMBERS and not out.is_cpu
        if made or (function in INDEXING and not args[0].is_cpu and _has_list(args[1])):
            raise AssertionError(f"{function.__name__} from Python numbers: the host waits for them to be there")
        return out


def _has_list(index) -> bool:
    return any(type(x) is list for x in (index if isinstance(index, tuple) else (index,)))


class NoValuesFromTheDevice(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU and does not fail on its own where there are no values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(x.is_meta or x.is_cuda for x in tensors)
        name = function.name()
        if there and "index" in name and any(x.dtype in (torch.bool, torch.uint8) for x in _indices(args)):
            raise AssertionError(f"{name} by a mask: how many rows these are is read from the GPU")
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in [*tensors, *tree_leaves(out)] if isinstance(x, torch.Tensor) and x.dim()}
        if len(devices) > 1 and not (name == "aten::_to_copy" and (kwargs or {}).get("non_blocking")):
            raise AssertionError(f"{name} from one device to another: the host waits for it")
        return out


def _indices(args) -> list[torch.Tensor]:
    return [x for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)]


def make(spec: str, memory: str, backbone: str, learns: bool) -> tuple[UserModel, PackedBatch]:
    """A model with one open task, in training, and a batch."""
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(V, 32, 2, max_len=20, dropout=0.0, **BACKBONES[backbone])))
    if not learns:
        model.freeze_backbone()
    model.add_task(SPECS[spec], MemoryConfig(**{"dropout": 0.0, "item_dropout": 0.0, **MEMORIES[memory]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    histories = torch.randint(int(NEW[-1]) + 1, V + 1, (sum(LENGTHS),)).split(LENGTHS)
    return model.train(), PackedBatch.from_lists(histories, num_items=V, max_len=20)


def targets_of(spec: TaskSpec) -> torch.Tensor:
    """One a history, as the loss takes them; of items, ids."""
    if spec.kind == "items":
        return NEW
    return torch.arange(len(LENGTHS)) % (3 if spec.kind == "classes" else 2)


def step(model: UserModel, batch: PackedBatch, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs and the gradients of everything that learns."""
    ((name, task),) = model.tasks.items()
    rows = torch.arange(len(batch), device=model.device)
    outputs, columns = model.member_outputs(batch, name), task.columns(target)
    loss = sum(task.loss(output, columns, rows) for output in outputs)
    learned = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    found = {"loss": loss, **{f"output {i}": output for i, output in enumerate(outputs)}}
    return found | {name: grad for name, grad in zip(learned, grads) if grad is not None}


@contextmanager
def nothing_waits():
    """Raises where the host would have to wait for a GPU."""
    with NoNumbersToTheDevice(), NoValuesFromTheDevice():
        yield


@pytest.fixture
def no_values(monkeypatch):
    """The device whose tensors hold no values and go the way of CUDA tensors."""
    monkeypatch.setattr(_gpu, "_emulator", SimpleNamespace(prompt_attention_fits=lambda dim, scalar: True))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)  # which does not know that device
    return "meta"


WAITING = {
    "a number": lambda x: int(x[0]),
    "a list": lambda x: x.tolist(),
    "a condition": lambda x: bool(x.any()),
    "a mask": lambda x: x[x > 0],
    "a mask to write": lambda x: x.clone().__setitem__(x > 0, 1),
    "nonzero": lambda x: (x > 0).nonzero(),
    "unique": lambda x: x.unique(),
    "as often as it says": lambda x: torch.repeat_interleave(x),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.arange(3).to(x.device),
    "from numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "by numbers": lambda x: x[[0, 1]],
}


@pytest.mark.parametrize("way", WAITING)
def test_waiting_is_noticed(way, no_values):
    x = torch.arange(4).to(no_values)
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), nothing_waits():
        WAITING[way](x)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_reads_nothing(case, no_values):
    model, batch = make(*case)
    inputs = (model.to(no_values), batch.to(no_values), targets_of(SPECS[case[0]]).to(no_values))
    with nothing_waits():
        got = step(*inputs)
    assert all(tensor.is_meta for tensor in got.values())
    assert len(got) > 2


def mixed() -> tuple[UserModel, PackedBatch, torch.Tensor]:
    """A model whose tasks have every placement, a batch, and the task of each row."""
    model, batch = make("repeats", "tail", "transformer", False)
    for spec, memory in (("binary", "prefix"), ("classes", "last"), ("regression", "both")):
        model.add_task(SPECS[spec], MemoryConfig(**MEMORIES[memory]))
    return model.eval(), batch, torch.arange(len(batch)) % 3


def outputs_of(model: UserModel, batch: PackedBatch, index: torch.Tensor) -> list[torch.Tensor]:
    """Of a batch that mixes tasks, which is told on the CPU, and the vectors of every task."""
    return [*(out for _, out in model(batch, task_index=index).values()), *model.encode(batch).values()]


def test_mixed_tasks_read_nothing(no_values):
    model, batch, index = mixed()
    inputs = (model.to(no_values), batch.to(no_values), index)
    with nothing_waits():
        assert all(tensor.is_meta for tensor in outputs_of(*inputs))


def as_near(got: dict, want: dict) -> None:
    """The kernels are compared with float64 where they are tested; here, that they are given the right rows."""
    assert got.keys() == want.keys()
    torch.testing.assert_close({name: tensor.cpu() for name, tensor in got.items()}, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_gives_what_it_gives_on_the_cpu(case, cuda, monkeypatch):
    target = targets_of(SPECS[case[0]])
    with monkeypatch.context() as patch:
        patch.setattr(_gpu, "_emulator", None)
        model, batch = make(*case)
        want = step(model, batch, target)
    as_near(step(model.to(cuda), batch.to(cuda), target.to(cuda)), want)


def test_mixed_tasks_give_what_they_give_on_the_cpu(cuda, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_gpu, "_emulator", None)
        model, batch, index = mixed()
        want = outputs_of(model, batch, index)
    got = outputs_of(model.to(cuda), batch.to(cuda), index)
    as_near(dict(enumerate(got)), dict(enumerate(want)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_is_a_graph(case):
    model, batch = make(*case)
    inputs = (model.cuda(), batch.to("cuda"), targets_of(SPECS[case[0]]).cuda())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [step(*inputs) for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*inputs)
    graph.replay()
    as_near(got, {name: tensor.cpu() for name, tensor in want.items()})
