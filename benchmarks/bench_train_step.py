"""One step of prompt tuning under a frozen backbone, against the same step in PyTorch, padded and in length buckets.

Forward, cross-entropy over the catalogue or over classes, backward into the tail prompt and the head only, Adam. All
ways get their histories as tensors of ids, padded or packed, with every index made outside the clock. The share of the
matrix-product rate counts all layers on all real rows, and the gradients of rows alone on the way back.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from measure import Report, main
from padded_model import (
    CLASSES,
    COLUMNS,
    ITEMS,
    QUICK,
    SHAPES,
    TASKS,
    Group,
    PaddedModel,
    assert_as_right_as,
    forward_gflop,
    make_batch,
    make_model,
    padded_ways,
    report_ways,
)
from torch import Tensor

from pcl_ext import UserModel
from pcl_ext.batch import PackedBatch
from pcl_ext.model import task_loss

SEEN = -1e9  # the score of what a history holds already


class Step:
    """Forward, backward into the parameters, Adam; `short`: forward under bfloat16 autocast."""

    def __init__(self, parameters: list[Tensor], loss: Callable[[], Tensor], short: bool):
        self.parameters, self.compute, self.short = parameters, loss, short
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Mean over the users."""
        with torch.autocast(self.parameters[0].device.type, torch.bfloat16, enabled=self.short):
            return self.compute()

    def gradients(self) -> list[Tensor]:
        """Of the prompt and of the head."""
        return list(torch.autograd.grad(self.loss(), self.parameters))


def our_step(model: UserModel, batch: PackedBatch, name: str, target: Tensor, short: bool) -> Step:
    task, rows = model.task(name), torch.arange(len(batch), device=model.device)
    parameters = [*task.memory_parameters(), *task.head.parameters()]
    return Step(parameters, lambda: task_loss(task.spec, model(batch, name), target, rows), short)


def their_step(
    model: UserModel,
    groups: list[Group],
    batch: PackedBatch,
    name: str,
    target: Tensor,
    short: bool,
    dtype=torch.float32,
    newest_only: bool = False,
) -> Step:
    twin = PaddedModel(model.backbone, dtype, torch.bfloat16 if short else None)
    (spec, readout), task = TASKS[name], model.task(name)
    prompt = task.tail().detach().to(dtype, copy=True).requires_grad_()
    head, seen = deepcopy(task.head).to(dtype), (batch.users, batch.items - 1)

    def loss() -> Tensor:
        features, newest = twin.vectors(groups, prompt, readout, newest_only)
        if spec.kind != "items":
            return F.cross_entropy(head(features).to(dtype), target)
        scores = F.linear(head.queries(features, newest), twin.weights["table"][1:], head.bias)
        return F.cross_entropy(scores.index_put(seen, scores.new_tensor(SEEN)).to(dtype), target)

    return Step([prompt, *head.parameters()], loss, short)


def bench(report: Report, users: int, dim: int, num_heads: int) -> None:
    model, batch = make_model(dim, num_heads).train(), make_batch(users)
    linear, attention = forward_gflop(batch, dim)
    gflop = 2 * linear + 3.5 * attention
    targets = {"items": torch.randint(ITEMS // 2, ITEMS, (users,)), "label": torch.randint(CLASSES, (users,))}
    for name in TASKS:
        task, ways_of = (batch, name, targets[name]), padded_ways(batch, TASKS[name][1])
        exact = their_step(model, ways_of["padded"][0], *task, False, torch.double).gradients()
        for short, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            ways = {
                way: their_step(model, groups, *task, short, newest_only=newest)
                for way, (groups, newest) in ways_of.items()
            }
            ways = {"fused": our_step(deepcopy(model), *task, short), **ways}
            got = {way: step.gradients() for way, step in ways.items()}
            for gradients in got.values():
                assert_as_right_as(gradients, got["padded"], exact)  # no speed without truth
            what = "catalogue" if name == "items" else "label"
            report_ways(report, f"D {dim}, {what}, {str(dtype)[6:]}", ways, gflop, dtype)


if __name__ == "__main__":
    title = f"train step, users of mean length 64, {ITEMS} items, 2 layers; milliseconds"
    main(title, COLUMNS, bench, SHAPES, QUICK)
