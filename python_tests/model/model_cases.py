"""What tests of the model share: histories, a task of each kind, a small frozen backbone."""

import torch

from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.task import TaskSpec

V, LENGTHS = 40, [5, 0, 1, 12, 30, 3]
PLACEMENTS = ["none", "tail", "prefix", "both", "layers"]
SPECS = {
    "rank": TaskSpec("rank", "items", "what is bought next", catalogue=tuple(range(5, 25))),
    "click": TaskSpec("click", "binary", "clicks"),
    "age": TaskSpec("age", "classes", "age group", num_classes=3),
    "value": TaskSpec("value", "regression", "basket value"),
}
KINDS = {"rotary": {"positions": "rotary"}, "nextitnet": {"kind": "nextitnet", "num_layers": 3}}  # besides the default


def histories(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V + 1, (n,), generator=generator).tolist() for n in lengths]


def pack(lists):
    return PackedBatch.from_lists(lists, num_items=V, max_len=20)


def make_model(max_len=20, **shape):
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(V, dim=16, max_len=max_len, **shape)))
    model.freeze_backbone()
    return model.eval()


def add(model, task, placement="tail", prompt_len=4, **options):
    """A task, a name of SPECS or a spec, whose every tensor is random, so that nothing is 0 by luck."""
    options = {"item_width": 16} | options
    config = MemoryConfig(placement=placement, prompt_len=prompt_len, dropout=0.0, **options)
    task = model.add_task(SPECS[task] if isinstance(task, str) else task, config)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(0, 0.5)
    return task
