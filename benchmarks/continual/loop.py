"""The one training loop of every baseline: epochs, cosine schedule, averaged weights, stopping by the valid users."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pcl_ext.loop import Average, CosineSchedule

if TYPE_CHECKING:
    from benchmarks.continual.learner import Learner


@dataclass(frozen=True)
class Run:
    """batches: epoch -> (steps, batches); loss of a batch; score of the valid users, the larger the better.

    start  the score of the weights as they are, where they may be kept: those that no epoch beats
    least_epochs  so many are not ended by patience
    """

    batches: Callable[[int], tuple[int, Any]]
    loss: Callable[[Any], Tensor]
    score: Callable[[], float]
    epochs: int
    patience: int
    start: Callable[[], float] | None = None
    least_epochs: int = 0


def train(learner: Learner, optimizer: torch.optim.Optimizer, run: Run) -> None:
    """Train until the score stops rising; the best epoch's weights stay.

    What is scored and kept is the average over the epochs so far, as in `learn_task`; for a method that starts from
    scratch, where an average stays far behind, the weights themselves.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    schedule, best, best_epoch, kept = CosineSchedule(optimizer), -math.inf, -1, []
    average = Average({str(place): parameter for place, parameter in enumerate(trained)})
    if run.start is not None:
        learner.eval()
        best, kept = run.start(), [p.detach().clone() for p in trained]
    for epoch in range(run.epochs):
        steps, batches = run.batches(epoch)
        learner.train()
        for step, batch in enumerate(batches):
            learner.progress = step / (steps - 1) if steps > 1 else 1.0
            schedule((epoch + step / steps) / run.epochs)
            optimizer.zero_grad(set_to_none=True)
            loss = run.loss(batch)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"{type(learner).__name__}: the loss is {loss.item()}; lower its rate")
            loss.backward()
            learner.before_step()
            optimizer.step()
            learner.after_step()
        learner.eval()
        average.add(epoch)
        with nullcontext() if learner.scratch else average.in_place():
            score = run.score()
            if score > best:
                best, best_epoch = score, epoch
                kept = [p.detach().clone() for p in trained]
        if epoch + 1 >= run.least_epochs and epoch - best_epoch >= run.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    learner.eval()
