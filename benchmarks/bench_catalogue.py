"""A pretraining step over a large catalogue: sampled softmax and exact cross-entropy in chunks, against full logits.

Forward, loss at every position, backward, AdamW. Each way runs in a process of its own, so that its peak memory is its
own: weights, gradients, optimiser and all, less what the process held before it made the model; memory is the C
library's as it comes, not kept for reuse as in other benchmarks. Rows are events.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from measure import Report, median_ms
from torch import Tensor

from pcl_ext import Backbone, BackboneConfig, PackedBatch, TaskSpec, UserModel
from pcl_ext.next_item import NextItemLoss
from pcl_ext.train import NEXT, PretrainConfig, adamw

WAYS = ("sampled", "chunks", "plain")
SHAPES = [(100_000, 512), (1_000_000, 512)]
COLUMNS = ["plain / MB", "items", "rows", "way", "MB", "ms", "plain / ms"]
LENGTH = 32


def make(items: int, rows: int) -> tuple[dict[str, Callable[[], Tensor]], Backbone, NextItemLoss]:
    """The losses of each way over one backbone and one batch; popular items are more frequent, as they are."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(items, dim=64, max_len=LENGTH, dropout=0.0))
    task = UserModel(backbone).add_task(TaskSpec("next", "items", repeats=True), NEXT)
    drawn = (torch.rand(100_000 + rows + LENGTH) ** 4 * items).long().clamp_max(items - 1) + 1
    train = SimpleNamespace(
        num_items=items,
        num_users=1,
        fold=np.zeros(1, np.uint8),
        items=drawn[:100_000].numpy(),
        offsets=np.array([0, 100_000]),
    )
    users = rows // LENGTH
    history = drawn[100_000 : 100_000 + rows + users]
    offsets = torch.arange(users + 1) * (LENGTH + 1)
    batch = SimpleNamespace(history=PackedBatch.from_packed(history, offsets))
    exact, sampled = (NextItemLoss(backbone, task, train, n) for n in (None, PretrainConfig().negatives))
    inputs = PackedBatch.from_packed(history.view(users, -1)[:, :-1].flatten(), torch.arange(users + 1) * LENGTH)
    target = history.view(users, -1)[:, 1:].flatten() - 1

    def plain() -> Tensor:
        states = backbone(inputs)[-1]
        return F.cross_entropy(F.linear(task.head.queries(states, states), backbone.table[1:], task.head.bias), target)

    ways = {"sampled": lambda: sampled(batch), "chunks": lambda: exact(batch), "plain": plain}
    return ways, backbone, sampled


def check(items: int = 3000, rows: int = 256) -> None:
    """No speed without truth: loss and gradients of all ways, the sampled one's where its sample is every item once."""
    ways, backbone, sampled = make(items, rows)
    sampled.sampler = lambda: (torch.arange(1, items + 1), torch.zeros(items))
    found = []
    for way in ways.values():
        backbone.zero_grad()
        loss = way()
        loss.backward()
        found.append(
            [loss.detach(), *(p.grad.to_dense() if p.grad.is_sparse else p.grad for p in backbone.parameters())]
        )
    for got in found:
        torch.testing.assert_close(got, found[-1])


def memory_mb(name: str) -> float:
    """VmRSS, what this process holds now, or VmHWM, the most it ever held."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1e3


def step(items: int, rows: int, way: str, threads: int) -> None:
    """In a process of its own: print peak memory and median time of a step."""
    torch.set_num_threads(threads)
    before = memory_mb("VmRSS")
    ways, backbone, _ = make(items, rows)
    optimizer = adamw([{"params": backbone.parameters(), "lr": 1e-3}], PretrainConfig(), 1000)

    def run() -> None:
        optimizer.zero_grad()
        ways[way]().backward()
        optimizer.step()

    ms = median_ms(run, seconds=1.0, least=3)
    print(json.dumps({"ms": ms, "mb": memory_mb("VmHWM") - before}))


def measured(items: int, rows: int, way: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", str(items), str(rows), way, str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bench(report: Report, items: int, rows: int) -> None:
    found = {way: measured(items, rows, way, report.arguments.threads) for way in WAYS}
    for way, result in found.items():
        memory, time = found["plain"]["mb"] / result["mb"], found["plain"]["ms"] / result["ms"]
        report.row(memory, items, rows, way, result["mb"], result["ms"], time)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--step", nargs=4)
    own, _ = parser.parse_known_args()
    if own.step:
        items, rows, way, threads = own.step
        step(int(items), int(rows), way, int(threads))
    else:
        check()
        report = Report("pretraining step over a large catalogue, D 64, 2 layers; MB and milliseconds", COLUMNS)
        for shape in report.shapes(SHAPES, [(20_000, 64)]):
            bench(report, *shape)
        report.close()
