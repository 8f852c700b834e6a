"""Parts of a layer that do more than their weights say (adapters, hooks, other products) are called."""

from functools import partial

import pytest
import torch
from model_cases import SPECS, V, add, histories, make_model, pack
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from pcl_ext.model import Backbone, BackboneConfig, UserModel
from pcl_ext.store import from_pretrained, save_pretrained

PARTS = {
    "transformer": ["norm_attention", "qkv", "out", "norm_ffn", "ffn_in", "ffn_out"],
    "nextitnet": ["conv_in", "norm_in", "conv_out", "norm_out"],
}
EVERY = [(kind, part) for kind, parts in PARTS.items() for part in parts]


class Adapter(nn.Module):
    """What stands in a part's place: its output and some more. It learns nothing of the part itself."""

    def __init__(self, part):
        super().__init__()
        self.part, self.more = part, nn.Parameter(torch.tensor(0.5))

    @property
    def weight(self):
        return self.part.weight

    @property
    def bias(self):
        return self.part.bias

    def forward(self, x):
        out = self.part(x)
        return out + self.more * out.sin()


def backbone(kind, **shape):
    torch.manual_seed(0)
    return Backbone(BackboneConfig(V, dim=16, max_len=20, kind=kind, dropout=0.0, **shape))


def run(backbone, read="every"):
    batch = pack(histories([5, 0, 1, 12]))
    return backbone(batch, read=read)[-1]


@pytest.mark.parametrize("read", ["every", "newest"])
@pytest.mark.parametrize(("kind", "part"), EVERY)
def test_a_part_with_a_hook_that_changes_nothing_gives_the_same(kind, part, read):
    """Called one by one, the parts compute what the ops do; so do their gradients."""
    plain, called = backbone(kind).double(), backbone(kind).double()
    calls = []
    getattr(called.layers[1], part).register_forward_hook(lambda *_: calls.append(part))
    want, found = run(plain, read), run(called, read)
    assert calls
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    want.square().sum().backward()
    found.square().sum().backward()
    for mine, theirs in zip(called.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", PARTS)
def test_a_prompt_learns_the_same_beside_hooks(kind):
    """On a frozen backbone what lies before a tail prompt is computed apart: there the parts are called, too."""
    model, batch = make_model(kind=kind), pack(histories([5, 0, 1, 12]))
    tail, calls = add(model, "click").memories["tail"].rows, []
    want = torch.autograd.grad(model(batch, "click").square().sum(), tail)[0]
    for part in PARTS[kind]:
        getattr(model.backbone.layers[0], part).register_forward_pre_hook(lambda *_: calls.append(1))
    found = torch.autograd.grad(model(batch, "click").square().sum(), tail)[0]
    assert len(calls) > len(PARTS[kind])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "part"), EVERY)
def test_an_adapter_in_a_parts_place_takes_part_and_learns(kind, part):
    model = make_model(kind=kind)
    before = run(model.backbone)
    layer = model.backbone.layers[0]
    setattr(layer, part, Adapter(getattr(layer, part)))
    after = run(model.backbone)
    assert not torch.allclose(before, after, atol=1e-3)
    after.square().sum().backward()
    assert getattr(layer, part).more.grad.abs() > 0


@pytest.mark.parametrize("how", ["subclass", "instance", "pre-hook"])
@pytest.mark.parametrize(("kind", "part"), EVERY)
def test_another_forward_is_called(kind, part, how):
    model = backbone(kind)
    before, one = run(model), getattr(model.layers[0], part)
    forward = type(one).forward
    if how == "subclass":
        one.__class__ = type("Sine", (type(one),), {"forward": lambda self, x: forward(self, x).sin()})
    elif how == "instance":
        one.forward = lambda x: forward(one, x).sin()
    else:
        one.register_forward_pre_hook(lambda part, inputs: (inputs[0].sin(),))
    assert not torch.allclose(before, run(model), atol=1e-3)


@pytest.mark.parametrize("kind", PARTS)
def test_pruned_weights_are_masked_anew_in_every_step(kind):
    model = backbone(kind)
    part = getattr(model.layers[0], PARTS[kind][2 if kind == "transformer" else 0])
    prune.l1_unstructured(part, "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    found = run(model).detach()
    prune.remove(part, "weight")
    torch.testing.assert_close(run(model).detach(), found)


@pytest.mark.filterwarnings("ignore:torch.:DeprecationWarning", "ignore:torch.quantize_:UserWarning")
def test_dynamically_quantised_layers_run():
    model = backbone("transformer").eval()
    before = run(model)
    engine = torch.backends.quantized.supported_engines
    if "fbgemm" not in engine and "x86" not in engine:
        pytest.skip("this torch has no quantised products")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    torch.testing.assert_close(run(quantised), before, rtol=0.1, atol=0.1)


def test_low_rank_prompts_say_that_they_cannot_change_such_a_weight():
    model = UserModel(backbone("transformer"))
    layer = model.backbone.layers[-1]
    layer.out = Adapter(layer.out)
    model.freeze_backbone()
    task = add(model, "click", "none", low_rank=2)
    with pytest.raises(TypeError, match="low_rank changes the weight of the top layer's 'out', which a "):
        model(pack(histories([3, 4])), task.spec.name)


@pytest.mark.parametrize("part", [None, "qkv", "compiled"])
def test_low_rank_prompts_say_that_they_cannot_change_what_another_forward_reads(part):
    """A copy of such a layer computed with the weights of the layer itself: what the task had learned was not read."""
    model = UserModel(backbone("transformer"))
    model.freeze_backbone()
    layers = model.backbone.layers
    if part == "compiled":
        layers[-1] = torch.compile(layers[-1], backend="eager")
    else:
        owner = layers[-1] if part is None else getattr(layers[-1], part)
        owner.forward = partial(checkpoint, owner.forward, use_reentrant=False)
    task = add(model, "click", "none", low_rank=2)
    with pytest.raises(TypeError, match="low_rank changes weights of the top layer, which has a forward of its own"):
        model(pack(histories([3, 4])), task.spec.name)


@pytest.mark.parametrize("part", ["prompt", "head", "adapter"])
def test_a_task_is_not_closed_with_tensors_that_a_run_could_not_hold(model, tmp_path, part):
    """It was, and saved: the run then did not load."""
    task = model.add_task(SPECS["click"])
    if part == "adapter":
        task.head.linear = nn.Sequential(task.head.linear)
    else:
        owner, name = (task.memories["tail"], "rows") if part == "prompt" else (task.head.linear, "weight")
        parametrize.register_parametrization(owner, name, nn.Identity())
    with pytest.raises(
        ValueError, match="task 'click' cannot be closed: .* are not the tensors it was made with; merge"
    ):
        model.freeze_task("click")
    assert not task.closed
    if part == "adapter":
        task.head.linear = task.head.linear[0]
    else:
        parametrize.remove_parametrizations(owner, name)
    model.freeze_task("click")
    save_pretrained(model, tmp_path / "run")
    batch = pack(histories())
    assert torch.equal(from_pretrained(tmp_path / "run")(batch, "click"), model.eval()(batch, "click"))
