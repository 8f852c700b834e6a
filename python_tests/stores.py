"""Small models and run folders for the tests of the store."""

import json
from pathlib import Path

import torch

from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.store import hash_tensor
from pcl_ext.task import TaskSpec

SPECS = {
    "next": TaskSpec("next", "items"),
    "range_b": TaskSpec("range_b", "items", catalogue=(7, 3, 20)),
    "ctr": TaskSpec("ctr", "binary", "will click"),
    "age": TaskSpec("age", "classes", num_classes=3),
    "spend": TaskSpec("spend", "regression"),
}
HISTORIES = [[1, 2, 3], [], [5] * 9, [20]]
RECORD = {"dataset": {"name": "shop"}, "matrix": {"rows": [{"next": {"mrr@5": 0.1}}]}}


def make_model(*tasks, seed=0, placement="both"):
    torch.manual_seed(seed)
    model = UserModel(Backbone(BackboneConfig(20, dim=4, num_layers=1, max_len=6)))
    model.freeze_backbone()
    for name in tasks:
        add(model, name, placement)
    return model.eval()


def add(model, name, placement="both"):
    task = model.add_task(SPECS[name], MemoryConfig(placement=placement, prompt_len=2, item_width=2, tied=False))
    for parameter in task.parameters():
        parameter.data.normal_()
    model.freeze_task(name)


def hashes(model):
    return {name: hash_tensor(tensor) for name, tensor in model.state_dict().items()}


def files(path):
    return sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file() and "lock" not in p.name)


def path_of(run, name):
    manifest = json.loads((run / "manifest.json").read_text())
    entries = {task["name"]: task for task in manifest["tasks"]} | {"backbone": manifest["backbone"]}
    return run / entries[name]["file"]


def flip(run, name):
    file = path_of(run, name)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file
