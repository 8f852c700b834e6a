"""LwF (Li and Hoiem, 2016): earlier heads must answer as the previous model does, on the users of the current task.

The paper sums the losses of earlier heads, here they are averaged: the strength, which is searched, means the same for
the second task as for the last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.continual.learner import Learner, trainable_copy
from pcl_ext.data import ExampleBatch
from pcl_ext.model import Backbone, Task, freeze
from pcl_ext.model.encoded import encode

TEMPERATURE = 2.0


class Lwf(Learner):
    adapts = True
    previous: Backbone | None = None

    def begin(self, name: str) -> None:
        previous = trainable_copy(self.model.backbone)
        freeze(previous)
        object.__setattr__(self, "previous", previous)  # no part of this module: nobody trains or stores it

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        tasks = [self.model.task(other) for other in self.model.task_names if other != name]
        own = self.model.task(name)
        every = any(task.every_state for task in [own, *tasks])
        now = encode(self.model.backbone, batch.history, every_state=every)
        with torch.no_grad():
            then = encode(self.previous, batch.history, every_state=every)
        table, old_table = self.model.backbone.table, self.previous.table
        kept = sum(distillation(task, task(now, table), task(then, old_table)) for task in tasks)
        learned = own.loss(own(now, table), own.columns(batch.target), batch.target_row)
        return learned + self.world.setting.strength * kept / len(tasks)


def distillation(task: Task, now: Tensor, then: Tensor) -> Tensor:
    """How far outputs are from earlier ones: cross-entropy at TEMPERATURE less its least value; squares for values, in
    units of the targets' deviation."""
    if task.spec.kind == "regression":
        return F.mse_loss(now, then) / task.head.unit[1] ** 2
    if task.spec.kind == "binary":
        now, then = (torch.stack([torch.zeros_like(x), x], 1) for x in (now, then))
    now, then = (F.log_softmax(x.float() / TEMPERATURE, 1) for x in (now, then))
    return F.kl_div(now, then, reduction="batchmean", log_target=True) * TEMPERATURE**2
