"""UserModel.encode of K tasks in one call against K calls, no gradient: histories of 200, tail prompts of t = 20 rows.

What an extra task costs is a share of one call for one task, from the calls for 1 and for K tasks; t / n is 10 %.
"""

import torch
from measure import Report, main, medians_ms
from padded_model import ITEMS

from pcl_ext import BackboneConfig, MemoryConfig, TaskSpec, UserModel
from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone

LENGTH, PROMPTS = 200, 20
READOUTS = {"last state": ("last",), "last state and means": ("last", "mean")}
SHAPES = [(64, 64, 2, 8), (64, 64, 2, 32), (64, 256, 4, 8), (64, 256, 4, 32)]  # users, D, H, K
QUICK = [(3, 32, 2, 4)]
COLUMNS = ["what", "K calls / one", "extra task, % of a call", "one", "K calls", "call for one task"]


def make_model(dim: int, num_heads: int, tasks: int, readout: tuple[str, ...]) -> UserModel:
    """A frozen 2-layer backbone and closed tasks with tail prompts that are not zero."""
    model = UserModel(Backbone(BackboneConfig(ITEMS, dim, num_heads, max_len=LENGTH)))
    model.freeze_backbone()
    for place in range(tasks):
        task = model.add_task(TaskSpec(f"t{place}", "binary"), MemoryConfig(prompt_len=PROMPTS, readout=readout))
        torch.nn.init.normal_(task.tail(), std=0.05)
        model.freeze_task(f"t{place}")
    return model.eval()


@torch.no_grad()
def bench(report: Report, users: int, dim: int, num_heads: int, tasks: int) -> None:
    items = torch.randint(1, ITEMS + 1, (users * LENGTH,))
    batch = PackedBatch.from_packed(items, torch.arange(users + 1) * LENGTH)
    for name, readout in READOUTS.items():
        model = make_model(dim, num_heads, tasks, readout)
        ways = {
            "one": lambda model=model: model.encode(batch),
            "each": lambda model=model: {t: model.encode(batch, [t])[t] for t in model.task_names},
            "single": lambda model=model: model.encode(batch, ["t0"]),
        }
        together = ways["one"]()
        torch.testing.assert_close(together, ways["each"]())  # no speed without truth
        again = ways["one"]()
        assert all(torch.equal(together[task], again[task]) for task in together)
        ms = medians_ms(ways, least=4)
        extra = 100 * (ms["one"] - ms["single"]) / (tasks - 1) / ms["single"]
        report.row(f"D {dim}, K {tasks}, {name}", ms["each"] / ms["one"], extra, ms["one"], ms["each"], ms["single"])


if __name__ == "__main__":
    title = "encode, K tasks in one pass, histories of 200, tails of 20, 2 layers; milliseconds"
    main(title, COLUMNS, bench, SHAPES, QUICK)
