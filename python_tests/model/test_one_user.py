"""A request of one user: the short way through a layer has the bits of the ops, and keeps nothing that may grow old."""

import pytest
import torch
from model_cases import add, histories, make_model, pack
from torch.nn.utils import parametrize

from pcl_ext.model.layout import filled_histories, newest_rows, to_offsets
from pcl_ext.ops import direct, linear_op

pytestmark = [
    pytest.mark.needs_ext,
    pytest.mark.skipif(not linear_op.PAYS, reason="the plain C++ products are left to torch"),
]


def vectors(model, task, batch, monkeypatch, *, short: bool):
    """encode, and how often a layer took the short way."""
    taken, takes = [], direct.takes
    with monkeypatch.context() as patch:
        patch.setattr(direct, "takes", lambda *given: short and (taken.append(takes(*given)) or taken[-1]))
        with torch.no_grad():
            return model.encode(batch, [task])[task], sum(taken)


def assert_short_and_right(model, task, batch, monkeypatch):
    got, taken = vectors(model, task, batch, monkeypatch, short=True)
    want, _ = vectors(model, task, batch, monkeypatch, short=False)
    assert torch.equal(got, want)
    assert taken == len(model.backbone.layers)
    return got


@pytest.mark.parametrize("positions", ["learned_from_end", "rotary"])
@pytest.mark.parametrize("placement", ["none", "tail", "both", "layers"])
@pytest.mark.parametrize("readout", [("last",), ("last", "mean", "item_memory")])
def test_the_short_way_has_the_same_bits(positions, placement, readout, monkeypatch):
    model = make_model(positions=positions)
    add(model, "click", placement, readout=readout)
    model.freeze_task("click")
    for lengths in ([7], [20, 1], [5, 0, 3], [0]):
        assert_short_and_right(model, "click", pack(histories(lengths)), monkeypatch)


def test_nothing_is_kept_of_weights_that_change(model, monkeypatch):
    add(model, "click", readout=("last",))
    batch, layer = pack(histories([7])), model.backbone.layers[0]
    seen = [assert_short_and_right(model, "click", batch, monkeypatch)]
    layer.qkv.weight *= 2
    seen.append(assert_short_and_right(model, "click", batch, monkeypatch))
    layer.out.weight = torch.randn(16, 16)
    seen.append(assert_short_and_right(model, "click", batch, monkeypatch))
    layer.ffn_in.bias.data = torch.randn(64)
    seen.append(assert_short_and_right(model, "click", batch, monkeypatch))
    model.load_state_dict({name: x + 0.5 for name, x in model.state_dict().items()})
    seen.append(assert_short_and_right(model, "click", batch, monkeypatch))
    seen.append(assert_short_and_right(model.double(), "click", batch, monkeypatch))
    assert len({tuple(x.flatten().tolist()) for x in seen}) == len(seen)


class Twice(torch.nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_computed_is_read(model):
    add(model, "click", readout=("last",))
    batch, part = pack(histories([7])), model.backbone.layers[0].qkv
    doubled = make_model()
    doubled.load_state_dict(model.state_dict(), strict=False)
    add(doubled, "click", readout=("last",)).load_state_dict(model.task("click").state_dict())
    doubled.backbone.layers[0].qkv.weight *= 2
    part._parameters["weight"] = torch.nn.Parameter(part._buffers.pop("weight"), requires_grad=False)
    parametrize.register_parametrization(part, "weight", Twice())
    with torch.no_grad():
        assert torch.equal(model.encode(batch)["click"], doubled.encode(batch)["click"])


def test_a_weight_of_another_shape_or_dtype_is_named(model):
    add(model, "click", readout=("last",))
    batch, layer = pack(histories([7])), model.backbone.layers[1]
    good = layer.ffn_out.weight
    for bad in (good[:, :8], good.double()):
        layer.ffn_out.weight = bad
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match="weight_out"):
            model.encode(batch)


@pytest.mark.parametrize("part", ["layers.0", "dropout"])
def test_dropout_is_there_where_it_is_asked_for(part):
    backbone, batch = make_model(dropout=0.5).backbone, pack(histories([7]))
    torch.nn.Module.train(backbone.get_submodule(part))
    with torch.no_grad():
        once, again = (backbone(batch)[-1] for _ in range(2))
    assert not torch.equal(once, again)


@pytest.mark.parametrize("lengths", [[3], [2, 5], [2, 0, 5], [0], []])
def test_newest_rows_with_and_without_lengths_on_the_host(lengths):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    offsets = to_offsets(lengths)
    want = offsets[1:].index_select(0, filled_histories(offsets)) - 1
    assert torch.equal(newest_rows(offsets, lengths), want)
    assert torch.equal(newest_rows(offsets), want)
