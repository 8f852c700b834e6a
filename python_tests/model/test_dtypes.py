"""Models in other dtypes than float32, and what autocast must leave alone."""

import pytest
import torch
from model_cases import SPECS, V, add, histories, pack

from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.model.loss import task_loss

DTYPES = [torch.float64, torch.bfloat16, torch.float16]
KINDS = {
    "plain": ("none", {}),
    "prefix": ("prefix", {"readout": ("last", "pooled")}),
    "members": ("both", {"readout": ("mean", "item_memory", "pooled"), "pooled_units": 5, "members": 2}),
    "narrow members": ("tail", {"readout": ("item_memory",), "item_width": 1, "members": 2}),
    "low_rank": ("tail", {"low_rank": 2}),
    "earlier": ("none", {"readout": ("last", "earlier")}),
    "texts": ("tail", {"contextual": "texts"}),
}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(V, dim=16, num_heads=2, max_len=20)))
    model.freeze_backbone()
    return model.to(dtype).eval()


def dtypes_of(module):
    return {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_of_the_backbones_dtype_and_stays_so_when_closed(kind, name, dtype):
    placement, options = KINDS[kind]
    model = make_model(dtype)
    add(model, "age" if name != "age" else "value", placement="none")
    model.freeze_task(model.task_names[0])
    task = add(model, name, placement, **options)
    assert dtypes_of(task) == {dtype}
    with torch.no_grad():
        before = model(pack(histories()), name)
        model.freeze_task(name)
        after = model(pack(histories()), name)
    assert before.dtype == after.dtype == dtype
    assert dtypes_of(task) == {dtype}
    close = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(after, before, **close)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["prefix", "members", "texts"])
def test_closing_under_autocast_gives_the_same_bits(kind):
    placement, options = KINDS[kind]
    states = []
    for precise in (True, False):
        model = make_model()
        task = add(model, "click", placement, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            model.freeze_task("click")
        states.append(task.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert dtypes_of(task) == {torch.float32}


def test_the_text_of_a_task_has_the_same_bits_whatever_the_default_dtype(default_dtype):
    want = make_model().add_task(SPECS["click"], MemoryConfig(prompt_len=2)).text
    default_dtype(torch.bfloat16)
    got = make_model(torch.float32).add_task(SPECS["click"], MemoryConfig(prompt_len=2)).text
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_items_are_ranked_alike_whatever_the_default_dtype(dtype, default_dtype):
    model = make_model()
    add(model, "rank")
    want = model.predict(histories(), "rank", k=3)
    default_dtype(dtype)
    assert model.predict(histories(), "rank", k=3) == want


@pytest.fixture
def default_dtype():
    """Sets the default dtype for one test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", SPECS)
def test_a_loss_in_float64_is_of_float64(name):
    """Not rounded to float32 on the way, nor are its gradients."""
    model = make_model(torch.float64)
    task = add(model, name)
    with torch.no_grad():
        output = model(pack(histories()), name)
    target = torch.tensor([1, 0]) if name in ("rank", "age") else torch.tensor([1.0, 0.0])
    rows = torch.tensor([0, 4])
    output = output.clamp_min(-9.0).requires_grad_()
    for loss in (task.loss, lambda *args: task_loss(task.spec, *args)):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target, rows), output)
        assert loss(output[:1], target[:0], rows[:0]).dtype == torch.float64
        assert loss(output.detach().bfloat16(), target, rows).dtype == torch.float32
