"""Runs of other dtypes than float32: saved and loaded with the same bits, whatever torch's default is."""

import pytest
import torch
from stores import HISTORIES, SPECS, add, files, hashes, make_model

from pcl_ext import PackedBatch
from pcl_ext.store import StoreError, from_pretrained, save_pretrained

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def outputs(model):
    batch = PackedBatch.from_lists(HISTORIES, num_items=20, max_len=6)
    with torch.no_grad():
        return {name: model(batch, name) for name in model.task_names}


@pytest.fixture(params=DTYPES, ids=str)
def default(request):
    """torch's default dtype while a run is loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=DTYPES, ids=str)
def model(request):
    model = make_model().to(request.param)
    for name in SPECS:
        add(model, name)
    return model


def test_a_run_keeps_its_dtype_and_its_bits(model, default, tmp_path):
    save_pretrained(model, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        loaded = from_pretrained(tmp_path)
    assert hashes(loaded) == hashes(model)
    want = outputs(model)
    assert all(torch.equal(output, want[name]) for name, output in outputs(loaded).items())


@pytest.mark.parametrize("part", ["task", "backbone"])
def test_a_model_of_two_dtypes_is_not_saved(part, tmp_path):
    model = make_model("next", "ctr")
    (model.task("ctr") if part == "task" else model.backbone).double()
    with pytest.raises(StoreError, match=r"of task '(ctr|next)' is torch.float\d\d, .* call model.float\(\)"):
        save_pretrained(model, tmp_path)
    assert files(tmp_path) == []
    save_pretrained(model.float(), tmp_path)
    assert hashes(from_pretrained(tmp_path)) == hashes(model)
