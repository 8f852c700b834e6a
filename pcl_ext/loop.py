"""The training loop under `train`: epochs, early stopping, averaged weights."""

from __future__ import annotations

import logging
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pcl_ext.checkpoint import Checkpoint, Progress
from pcl_ext.metrics import higher_is_better
from pcl_ext.model.config import check_whole, plain
from pcl_ext.progress import progress as bar

if TYPE_CHECKING:
    from pcl_ext.infer import Score

_LOG = logging.getLogger(__name__)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_above_zero(config: object, *names: str) -> None:
    """ValueError where a setting is no finite number above 0; one of NumPy becomes a float."""
    for name in names:
        if not (is_number(value := getattr(config, name)) and value > 0):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
        object.__setattr__(config, name, plain(value))


@dataclass(frozen=True)
class LoopConfig:
    """Settings of one training run.

    Args:
        epochs: at most this many passes over the training users
        patience: stop after so many epochs without a better one on the valid users; the best epoch's weights are kept.
            A task is learned for half of `epochs` at least, rounded up, unless it starts at a ridge regression
        batch_tokens: packed rows a step; fewer where a task has few labels (`LearnConfig.step_tokens`)
        epoch_tokens: packed rows an epoch at most; of a larger dataset each epoch takes another part, drawn by seed
        learning_rate: of AdamW
        weight_decay: of AdamW, for a run of 1,000 steps; longer ones have less, by the root of their length
        precision: float32, or bfloat16 (mixed: weights and optimiser stay float32)
        seed: of everything random
        checkpoint_seconds: how often a step is followed by a checkpoint, where there is a place for one; less often
            where that would take more than a twentieth of the time
    """

    epochs: int = 60
    patience: int = 8
    batch_tokens: int = 4096
    epoch_tokens: int = 1_000_000
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    precision: str = "float32"
    seed: int = 0
    checkpoint_seconds: float = 30.0

    def __post_init__(self):
        check_whole(self, epochs=1, patience=1, batch_tokens=1, epoch_tokens=1, seed=0)
        check_above_zero(self, "learning_rate")
        for name in ("weight_decay", "checkpoint_seconds"):
            value = getattr(self, name)
            never = name == "checkpoint_seconds" and value == math.inf
            if not never and not (is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
            object.__setattr__(self, name, plain(value))
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {self.precision!r}")

    def step_tokens(self, events: int) -> int:
        """Packed rows a step, of an epoch of so many."""
        return self.batch_tokens


@dataclass(frozen=True)
class Problem:
    """What `fit` minimises and watches.

    batches   (epoch, first step) -> (steps of the epoch, the batches from that step on): same answer, same bits
    loss      of one batch
    validate  how the model as it is does on the valid users; `metric` decides which epoch is kept
    identity  JSON values: a checkpoint made for others is refused
    keep_start    the weights are good as they are: kept where no epoch beats them
    average       what is validated and kept is the average over the epochs so far, the e-th with weight e
    ties_by_loss  an epoch whose metric is within one standard error, its own, of the best so far is a tie: it replaces
                  the kept one where its loss is less or that one is no tie any more
    least_epochs  so many are not ended by patience
    """

    label: str
    batches: Callable[[int, int], tuple[int, Iterator[Any]]]
    loss: Callable[[Any], Tensor]
    validate: Callable[[], Score]
    metric: str
    identity: dict[str, Any]
    keep_start: bool = False
    average: bool = False
    ties_by_loss: bool = False
    least_epochs: int = 0


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    problem: Problem,
    config: LoopConfig,
    checkpoint: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Train until the validation metric stops improving; leaves the best epoch's weights in the model.

    Trains what has parameters and is in the optimiser. Returns the learning curve: one {"epoch", "loss", "valid",
    "valid_loss", "seconds", "best"} an epoch. A run that finds its own checkpoint goes on from there and ends with the
    same bits. Dropout draws from torch's global generator, which the caller has seeded.
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}  # other tasks may be open
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in own}
    schedule, average = CosineSchedule(optimizer), Average(trained)
    keeper = Checkpoint(checkpoint, config.checkpoint_seconds, trained, optimizer, problem.identity)
    progress, best, average.values = keeper.load()
    if problem.keep_start and progress.start is None:
        model.eval()
        progress.start = problem.validate().metrics
        best = {name: p.detach().clone() for name, p in trained.items()}
    while progress.epoch < config.epochs and (
        progress.epoch < problem.least_epochs or progress.stale_epochs() < config.patience
    ):
        steps, batches = problem.batches(progress.epoch, progress.step)
        model.train()
        for batch in _bar(batches, steps, progress, problem.label):
            started = time.monotonic()
            schedule((progress.epoch + progress.step / steps) / config.epochs)
            progress.loss_sum += _step(model, optimizer, problem, config, batch)
            progress.step += 1
            progress.seconds += time.monotonic() - started
            keeper.save(progress, best, average.values)
        model.eval()
        if problem.average:
            average.add(progress.epoch)
        with average.in_place():
            if _end_epoch(progress, problem.validate(), problem):
                best = {name: p.detach().clone() for name, p in trained.items()}
        _say_epoch(progress, problem.label)
        keeper.save(progress, best, average.values, now=True)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    _say_kept(progress, problem)
    return progress.curve


class Average:
    """Parameters averaged over epochs, the e-th (from 1 on) with weight e; nothing before the first is added.

    The later epochs of a run differ mostly by noise, which an average loses (Polyak and Juditsky, 1992).
    """

    def __init__(self, trained: dict[str, nn.Parameter]):
        self.trained, self.values = trained, dict[str, Tensor]()

    @torch.no_grad()
    def add(self, epoch: int) -> None:
        """Take the parameters as they are after an epoch, counted from 0."""
        for name, parameter in self.trained.items():
            if epoch == 0:
                self.values[name] = parameter.detach().clone()
            else:
                self.values[name].lerp_(parameter, 2 / (epoch + 2))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the average, where there is one."""
        own = {name: self.trained[name].detach().clone() for name in self.values}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)


class CosineSchedule:
    """Learning rates by the share of the epochs that is done: up in the first 2 %, then down to 0 along a cosine.

    A function of that share alone, so a checkpoint holds nothing of it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.highest = optimizer, [group["lr"] for group in optimizer.param_groups]

    def __call__(self, done: float) -> None:
        factor = min(1.0, 0.02 + done / 0.02) * 0.5 * (1.0 + math.cos(math.pi * done))
        for group, highest in zip(self.optimizer.param_groups, self.highest):
            group["lr"] = highest * factor


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, problem: Problem, config: LoopConfig, batch: Any
) -> float:
    device = next(model.parameters()).device.type
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss = problem.loss(batch)
    loss.backward()
    value = loss.item()  # here a GPU is waited for
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{problem.label}: the loss is {value}; lower learning_rate (now {config.learning_rate})"
        )
    optimizer.step()
    return value


def _end_epoch(progress: Progress, score: Score, problem: Problem) -> bool:
    """Append the epoch to the curve; True where it is the one to keep so far."""
    if not math.isfinite(score.loss):
        raise FloatingPointError(
            f"{problem.label}: the loss on the valid users is {score.loss}; mend their targets where these are out of "
            "range, or lower learning_rate"
        )
    best = _is_better(progress, score, problem)
    entry = {"epoch": progress.epoch, "loss": progress.loss_sum / max(progress.step, 1), "valid": score.metrics}
    progress.curve.append(entry | {"valid_loss": score.loss, "seconds": progress.seconds, "best": best})
    progress.epoch, progress.step, progress.loss_sum, progress.seconds = progress.epoch + 1, 0, 0.0, 0.0
    return best


def _is_better(progress: Progress, score: Score, problem: Problem) -> bool:
    value, *seen = (_worth(problem, v) for v in (score.metrics, *(e["valid"] for e in progress.curve)))
    if progress.start is not None:
        seen.append(_worth(problem, progress.start))
    kept = next((entry for entry in reversed(progress.curve) if entry["best"]), None)
    if not problem.ties_by_loss or kept is None:
        return all(value > other for other in seen)
    least = max(value, *seen) - score.standard_error.get(problem.metric, 0.0)  # too few users have none
    return value >= least and (score.loss < kept["valid_loss"] or _worth(problem, kept["valid"]) < least)


def _worth(problem: Problem, metrics: dict[str, float]) -> float:
    """The metric, the higher the better; one that is not defined is below all."""
    value = metrics[problem.metric] * (1 if higher_is_better(problem.metric) else -1)
    return -math.inf if math.isnan(value) else value


def _bar(batches: Iterator[Any], steps: int, progress: Progress, label: str) -> Iterator[Any]:
    """The batches of an epoch behind a progress bar, which says how the last one ended."""
    text = f"{label} epoch {progress.epoch}"
    if progress.curve:
        text += "  " + _metrics(progress.curve[-1]["valid"])
    with bar(text, steps, " steps", progress.step) as steps_done:
        for batch in batches:
            yield batch
            steps_done.update()


def _say_epoch(progress: Progress, label: str) -> None:
    """In the log, where stderr is no terminal with a bar that says it."""
    if not sys.stderr.isatty():
        last = progress.curve[-1]
        best = "  best so far" if last["best"] else ""
        _LOG.info("%s epoch %d  loss %.4f  %s%s", label, last["epoch"], last["loss"], _metrics(last["valid"]), best)


def _say_kept(progress: Progress, problem: Problem) -> None:
    """In the log: which epoch's weights the model has now."""
    kept = next((entry for entry in reversed(progress.curve) if entry["best"]), None)
    which = f"epoch {kept['epoch']} (of {len(progress.curve)}, from 0)" if kept else "the start, which no epoch beat,"
    value = (kept["valid"] if kept else progress.start)[problem.metric]
    _LOG.info("%s: %s is kept, %s %.4f on the valid users", problem.label, which, problem.metric, value)


def _metrics(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
