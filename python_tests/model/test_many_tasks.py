"""Many tasks in one pass: what each task alone gives, in any chunks, and prefixes that are computed once for good."""

import pytest
import torch
from model_cases import add, histories, pack

from pcl_ext.model import Backbone, BackboneConfig, UserModel, many_tasks
from pcl_ext.store import from_pretrained, save_pretrained, tensor_file
from pcl_ext.task import TaskSpec

READOUTS = [("last",), ("last", "mean", "item_memory")]


def add_many(model, placements):
    """A binary task for each placement; lengths and readouts in turn."""
    for place, placement in enumerate(placements):
        add(model, TaskSpec(f"t{place}", "binary"), placement, [3, 5, 25][place % 3], readout=READOUTS[place % 2])


@pytest.mark.parametrize("rows", [1, 40, 16_384])
@pytest.mark.parametrize(
    "placements", [["tail"] * 7, ["none"] * 3, ["tail", "none", "layers", "none", "prefix", "both", "tail"]]
)
def test_one_pass_equals_every_task_alone(model, monkeypatch, placements, rows):
    monkeypatch.setattr(many_tasks, "TAIL_ROWS", rows)
    add_many(model, placements)
    batch = pack(histories())
    together, again = model.encode(batch), model.encode(batch)
    assert list(together) == model.task_names
    for name in model.task_names:
        assert torch.equal(together[name], again[name])
        torch.testing.assert_close(together[name], model.encode(batch, [name])[name])


@pytest.mark.needs_ext
def test_chunks_change_no_bit(model, monkeypatch):
    add_many(model, ["tail"] * 6)
    batch = pack(histories())
    with torch.no_grad():
        whole = model.encode(batch)
        monkeypatch.setattr(many_tasks, "TAIL_ROWS", 30)
        parts = model.encode(batch)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_no_histories(model):
    add_many(model, ["tail", "none", "prefix", "tail"])
    assert all(vectors.shape[0] == 0 for vectors in model.encode(pack([])).values())


def test_a_closed_prefix_is_not_computed_again(model, monkeypatch):
    add(model, "click", "both")
    batch = pack(histories())
    before = model(batch, "click")
    model.freeze_task("click")
    after = model(batch, "click")
    torch.testing.assert_close(after, before)  # closing folds the item memory, to rounding
    monkeypatch.setattr(Backbone, "prefix", lambda *_: pytest.fail("computed again"))
    assert torch.equal(model(batch, "click"), after)
    add(model, "age", "tail")
    outputs = model(batch, task_index=torch.tensor([0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(outputs["click"][1], before[::2])


def test_a_task_is_not_closed_while_the_backbone_learns():
    model = UserModel(Backbone(BackboneConfig(40, dim=16, max_len=20)))
    add(model, "click", "prefix")
    with pytest.raises(ValueError, match="'click' cannot be closed while the backbone learns: call freeze_backbone"):
        model.freeze_task("click")
    model.freeze_backbone()
    model.freeze_task("click")
    assert model.task("click").keeps_prefix


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "saved before they were kept"])
def test_a_run_keeps_keys_and_values_of_prefixes(model, tmp_path, kept):
    add(model, "click", "prefix")
    model.freeze_task("click")
    batch = pack(histories())
    want, stored = model(batch, "click"), model.task("click").prefix_keys.clone()
    if not kept:
        for name in ("prefix_keys", "prefix_values"):
            del model.task("click")._buffers[name]
    save_pretrained(model, tmp_path)
    (file,) = (tmp_path / "tasks").glob("click-*.safetensors")
    assert ("prefix_keys" in tensor_file.read_tensors(file).tensors) == kept
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded.task("click").prefix_keys, stored)
    assert torch.equal(loaded(batch, "click"), want)
    save_pretrained(loaded, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(batch, "click"), want)


def test_what_tails_there_are_is_no_break_of_a_compiled_graph(model):
    tasks = {"click": add(model, "click"), "age": add(model, "age", prompt_len=2)}
    compiled = torch.compile(lambda: many_tasks._tails(tasks)[2], backend="eager", fullgraph=True)
    assert compiled() == 4
