"""UserState: five new events for each of many users with histories of 200, and a read, against full passes.

Both ways end with what the head of a task reads. Each call extends the same state: a copy of its numbers of rows is put
back first, which makes it forget the events of the call before. A tail prompt of 20 rows is computed anew either way.
"""

import torch
from measure import Report, main, medians_ms
from padded_model import ITEMS

from pcl_ext import BackboneConfig, MemoryConfig, TaskSpec, UserModel
from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone

LENGTH, NEW, PROMPTS = 200, 5, 20
TASKS = {"no prompt": "none", "tail of 20": "tail"}
SHAPES = [
    ("rotary", 1000, dict(dim=64, num_heads=2, positions="rotary")),
    ("rotary", 1000, dict(dim=256, num_heads=4, positions="rotary")),
    ("nextitnet, 8 blocks", 100, dict(dim=256, num_layers=8, kind="nextitnet")),
]
QUICK = [
    ("rotary", 3, dict(dim=32, positions="rotary")),
    ("nextitnet", 3, dict(dim=32, num_layers=2, kind="nextitnet")),
]
COLUMNS = ["what", "full passes / state", "extend and read", "full passes"]


def random_batch(users: int, length: int) -> PackedBatch:
    return PackedBatch.from_packed(torch.randint(1, ITEMS + 1, (users * length,)), torch.arange(users + 1) * length)


@torch.no_grad()
def bench(report: Report, name: str, users: int, shape: dict) -> None:
    model = UserModel(Backbone(BackboneConfig(ITEMS, max_len=256, **shape)))
    model.freeze_backbone()
    for placement in TASKS.values():
        memory = MemoryConfig(placement=placement, prompt_len=PROMPTS, readout=("last",))
        prompt = model.add_task(TaskSpec(placement, "binary"), memory).tail()
        if prompt is not None:
            torch.nn.init.normal_(prompt, std=0.05)
        model.freeze_task(placement)
    model.eval()
    known, new = random_batch(users, LENGTH), random_batch(users, NEW)
    state = model.user_state(known)
    items = torch.cat([known.items.view(users, -1), new.items.view(users, -1)], 1).flatten()
    whole = PackedBatch.from_packed(items, torch.arange(users + 1) * (LENGTH + NEW))
    lengths = state.lengths.clone()

    def extend(task: str) -> torch.Tensor:
        state.lengths = lengths.clone()
        state.extend(new)
        return model.encode(state, [task])[task]

    for title, task in TASKS.items():
        ways = {"state": lambda task=task: extend(task), "full": lambda task=task: model.encode(whole, [task])[task]}
        torch.testing.assert_close(ways["state"](), ways["full"]())  # no speed without truth
        ms = medians_ms(ways, least=4)
        report.row(
            f"{name}, D {shape['dim']}, {users} users, {title}", ms["full"] / ms["state"], ms["state"], ms["full"]
        )


if __name__ == "__main__":
    main("UserState, 5 new events on histories of 200; milliseconds", COLUMNS, bench, SHAPES, QUICK)
