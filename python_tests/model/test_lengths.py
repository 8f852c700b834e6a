"""A history longer than max_len is refused, by whatever way it reaches the backbone."""

import pytest
import torch
from model_cases import SPECS, V, add

from pcl_ext import Backbone, BackboneConfig, MemoryConfig, PackedBatch, UserModel

KINDS = {"learned": {}, "rotary": {"positions": "rotary"}, "convolutions": {"kind": "nextitnet"}}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    shape = BackboneConfig(V, dim=16, num_heads=2, max_len=20, **KINDS[request.param])
    model = UserModel(Backbone(shape))
    model.freeze_backbone()
    return model.eval()


def of_lengths(*lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return PackedBatch.from_packed(torch.ones(int(offsets[-1]), dtype=torch.int64), offsets)


@pytest.mark.parametrize("placement", ["none", "tail", "prefix", "layers"])
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_history_that_is_too_long_is_refused(model, placement, learning, mixed):
    add(model, "click", placement)
    add(model, "age", placement)
    asked = {"task_index": torch.tensor([0, 1, 0])} if mixed else {"task": "click"}
    with torch.set_grad_enabled(learning):
        model(of_lengths(3, 20, 0), **asked)
        with pytest.raises(
            ValueError, match=r"at most max_len = 20 long, got one of 21 \(history 1\); PackedBatch.from"
        ):
            model(of_lengths(3, 21, 0), **asked)


def test_one_that_many_tasks_read_is_refused(model):
    for name in ("click", "age"):
        model.add_task(SPECS[name], MemoryConfig(prompt_len=4))
    with pytest.raises(ValueError, match="at most max_len = 20 long, got one of 35"):
        model.encode(of_lengths(35))
