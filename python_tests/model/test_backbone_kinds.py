"""Rotary attention and convolutions: what each is in plain PyTorch, no future, no company, gradients; PCL on both."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import KINDS, SPECS, V, add, histories, make_model, pack

from pcl_ext.model import Backbone, BackboneConfig
from pcl_ext.store import from_pretrained, save_pretrained


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(**KINDS[request.param])


def padded_nextitnet(backbone, x):
    """One history's rows [n, D] by torch's own convolutions, zeros in front."""
    for layer in backbone.layers:
        branch = x
        for conv, norm in ((layer.conv_in, layer.norm_in), (layer.conv_out, layer.norm_out)):
            padded = F.pad(branch.T[None], (2 * conv.dilation[0], 0))
            branch = norm(F.conv1d(padded, conv.weight, conv.bias, dilation=conv.dilation)[0].T).relu()
        x = x + branch
    return backbone.norm(x)


def naive_rotary(backbone, x):
    """One history's rows [n, D] with rotations as complex numbers."""
    for layer in backbone.layers:
        q, k, v = layer.qkv(layer.norm_attention(x)).unflatten(1, (3, *layer.heads)).unbind(1)
        half = q.shape[2] // 2
        angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None].to(torch.complex128)
        q, k = (torch.complex(r[..., :half].double(), r[..., half:].double()) * turn for r in (q, k))
        q, k = (torch.cat([r.real, r.imag], -1).to(x.dtype) for r in (q, k))
        heads = (r.transpose(0, 1)[None] for r in (q, k, v))
        x = x + layer.out(F.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1).flatten(1))
        x = x + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm_ffn(x))))
    return backbone.norm(x)


NAIVE = {"rotary": naive_rotary, "nextitnet": padded_nextitnet}


def unfrozen(kind, **shape):
    options = {"positions": "rotary"} if kind == "rotary" else {"kind": "nextitnet", "num_layers": 8}
    torch.manual_seed(0)
    return Backbone(BackboneConfig(V, dim=16, max_len=64, **options, **shape)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_pytorch_and_so_do_gradients(kind):
    backbone = unfrozen(kind)
    batch = pack(histories([5, 0, 1, 12, 20]))
    rows = backbone.embed(batch.items, batch.offsets)
    got = backbone.run(rows, batch.offsets)[0][-1]
    parts = rows.split(batch.lengths.tolist())
    want = torch.cat([NAIVE[kind](backbone, part) for part in parts if len(part)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(got.shape)
    inputs = [p for name, p in backbone.named_parameters() if name != "position"]
    ours = torch.autograd.grad(got, inputs, grad, retain_graph=True)
    for mine, theirs in zip(ours, torch.autograd.grad(want, inputs, grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_rotary_positions_in_float64():
    backbone = unfrozen("rotary").double()
    batch = pack(histories([20]))
    rows = backbone.embed(batch.items, batch.offsets)
    got = backbone.run(rows, batch.offsets)[0][-1]
    torch.testing.assert_close(got, naive_rotary(backbone, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float64(kind):
    backbone = unfrozen(kind).double()
    offsets = torch.tensor([0, 3, 3, 8])
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: backbone.run(x, offsets)[0][-1], (x,))


def test_no_row_sees_the_future(model):
    batch = pack(histories())
    before = model.backbone(batch)
    changed = batch.items.clone()
    changed[batch.offsets[4] + 10 :] = 1  # the last ten events of a user, and another user
    after = model.backbone(pack([part.tolist() for part in changed.split(batch.lengths.tolist())]))
    kept = int(batch.offsets[4]) + 10
    for a, b in zip(before, after):
        assert torch.equal(a[:kept], b[:kept])
    assert not torch.equal(before[-1][kept:], after[-1][kept:])


def test_a_history_does_not_depend_on_the_batch(model):
    batch = pack(histories())
    together = model.backbone(batch)[-1].split(batch.lengths.tolist())
    for history, rows in zip(histories(), together):
        torch.testing.assert_close(model.backbone(pack([history]))[-1], rows)


@pytest.mark.parametrize("placement", ["none", "tail", "prefix", "both", "layers"])
def test_tasks_alone_together_and_mixed(model, placement):
    """Trunks are shared, prefixes are rows in front: the same as every task alone, however it is computed."""
    for place, name in enumerate(SPECS):
        add(model, name, placement, [3, 5, 25, 1][place], readout=[("last",), ("last", "mean")][place % 2])
    batch, index = pack(histories()), torch.tensor([3, 0, 1, 0, 2, 3])
    together = model.encode(batch)
    mixed = model(batch, task_index=index)
    for name in SPECS:
        torch.testing.assert_close(together[name], model.encode(batch, [name])[name])
        rows, output = mixed[name]
        torch.testing.assert_close(output, model(batch, name)[rows])


def test_a_prefix_is_rows_in_front_of_every_history(model):
    task, batch = add(model, "click", "prefix", 4), pack(histories())
    shared = model.backbone(batch, prefix=task.layer_prefix(model.backbone))
    own = model.backbone.embed(batch.items, batch.offsets).split(batch.lengths.tolist())
    lengths = [len(rows) + 4 for rows in own]
    rows = torch.cat([torch.cat([task.prefix(), part]) for part in own])
    naive, _ = model.backbone.run(rows, torch.tensor([0, *lengths]).cumsum(0))
    is_prompt = torch.cat([torch.arange(n) < 4 for n in lengths])
    for got, want in zip(shared, naive):
        torch.testing.assert_close(got, want[~is_prompt])


@torch.no_grad()
def test_layers_can_hold_whatever_a_prefix_computes(model):
    """Keys and values of every layer; of convolutions, what the two of a block read."""
    prefix, layers = (
        add(model, name, placement, readout=("last", "mean"))
        for name, placement in (("click", "prefix"), ("age", "layers"))
    )
    computed = prefix.layer_prefix(model.backbone)
    pairs = zip(computed.keys, computed.values)
    layers.memories["layers"].rows.copy_(torch.stack([torch.stack(pair).flatten(2) for pair in pairs]))
    vectors = model.encode(pack(histories()))
    torch.testing.assert_close(vectors["age"], vectors["click"])


@pytest.mark.parametrize("placement", ["tail", "prefix", "layers"])
def test_prompts_learn_on_a_frozen_backbone(model, placement):
    """The gradient along a direction is the difference of two outputs, in float64."""
    task, batch = add(model.double(), "click", placement, 3), pack(histories())
    rows = task.double().memories[placement].rows
    (grad,) = torch.autograd.grad(model(batch, "click").square().sum(), [rows])
    step, values = torch.randn_like(rows) * 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            rows.add_(step, alpha=sign)
            values.append(model(batch, "click").square().sum())
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, (grad * step).sum() / 1e-6, rtol=1e-4, atol=1e-6)


def test_a_run_keeps_the_kind(model, tmp_path):
    add(model, "click", "both")
    model.freeze_task("click")
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.backbone.config == model.backbone.config
    assert torch.equal(loaded(pack(histories()), "click"), model(pack(histories()), "click"))


def test_older_configurations_are_written_as_they_were():
    assert "kind" not in BackboneConfig(V).to_json()
    assert "positions" not in BackboneConfig(V).to_json()
    rotary = BackboneConfig(V, positions="rotary")
    assert BackboneConfig(**rotary.to_json()) == rotary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rnn"}, "kind must be one of transformer, nextitnet"),
        ({"positions": "none"}, "positions must be one of learned_from_end, rotary"),
        ({"positions": "rotary", "dim": 6}, "rotary positions need an even"),
    ],
)
def test_what_a_configuration_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(V, **options)
