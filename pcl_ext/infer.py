"""Using a model over a dataset: evaluation, outputs, the start of a head. Streaming: one batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pcl_ext.batch import PackedBatch
from pcl_ext.data import Dataset, ExampleBatch, Examples, iterate, make_batch, plan
from pcl_ext.metrics import TaskMetrics
from pcl_ext.model import Task, UserModel
from pcl_ext.progress import progress

BATCH_TOKENS = 16_384
MOST_SCORES = 1 << 26  # of a batch of users: 256 MB
FEWEST = 1_000  # of any sample below
MOST_JUDGED = 2_000_000_000  # of the valid users after an epoch: 2,000 of them over a million items
MOST_MEASURED = 20_000_000_000  # of a fold that is evaluated: 20,000 users over a million items, some minutes


@dataclass(frozen=True)
class Score:
    """One task measured on one fold.

    metrics, standard_error  by metric name
    loss                     mean of the task's training loss over the targets
    count                    targets that were ranked or predicted
    sample                   "20,000 of 1,500,000 examples" where a sample of the fold was measured; "" where all were
    outputs                  sha256 of all outputs, in a fixed order of batches: equal hashes mean equal bits; "" of
                             `measure`
    """

    metrics: dict[str, float]
    standard_error: dict[str, float]
    loss: float
    count: int
    outputs: str = ""
    sample: str = ""


@torch.no_grad()
def evaluate(
    model: UserModel, dataset: Dataset, tasks: Sequence[str] | None = None, *, fold: str = "test"
) -> dict[str, Score]:
    """Every metric of every task (all of the model's by default) on a fold; full ranking, all examples.

    Of an items task whose scores would be more than MOST_MEASURED a sample of the examples is measured, the same one at
    every call; `Score.sample` says so.
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names, got the str {tasks!r}")
    scores = {}
    for name in model.task_names if tasks is None else tasks:
        model.task(name)  # an unknown name is refused before anything is read
        examples = dataset.examples(name, fold)
        if not len(examples.target):
            raise ValueError(f"{dataset.path} has no {fold} users with a target of task {name!r}: nothing to measure")
        most, whole = max(FEWEST, MOST_MEASURED // model.task(name).spec.num_outputs(dataset.num_items)), len(examples)
        examples = drawn(examples, most, seed=0) if whole > most else examples
        digest = hashlib.sha256()
        score = _score(model.task(name), _hashed(outputs(model, dataset, name, examples, f"{fold} users"), digest))
        sample = f"{most:,} of {whole:,} examples" if whole > most else ""
        scores[name] = replace(score, outputs=digest.hexdigest(), sample=sample)
    return scores


def drawn(examples: Examples, count: int, seed: int) -> Examples:
    """So many of the examples, in their order, drawn without replacement: the same for the same seed."""
    rows = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
    return examples.select(rows.sort().values)


@torch.no_grad()
def measure(model: UserModel, dataset: Dataset, name: str, examples: Examples, users: str = "users") -> Score:
    """One task on some examples of it, called `users` while it lasts; without the hash of the outputs."""
    return _score(model.task(name), outputs(model, dataset, name, examples, users))


def _score(task: Task, batches: Iterable[tuple[ExampleBatch, Tensor]]) -> Score:
    """A task measured on batches and their outputs."""
    metrics, loss = TaskMetrics(task.spec), 0.0
    for batch, output in batches:
        columns = task.columns(batch.target)
        metrics.update(output, columns, batch.target_row)
        loss += float(task.loss(output, columns, batch.target_row)) * len(columns)
    return Score(metrics.compute(), metrics.standard_error(), loss / metrics.count, metrics.count)


def _hashed(batches: Iterable[tuple[ExampleBatch, Tensor]], digest) -> Iterator[tuple[ExampleBatch, Tensor]]:
    """The same; every output that passes goes into the digest."""
    for batch, output in batches:
        digest.update(output.cpu().contiguous().view(-1).numpy())  # the memory itself: no copy of it
        yield batch, output


@torch.no_grad()
def outputs(
    model: UserModel, dataset: Dataset, name: str, examples: Examples, users: str = "users"
) -> Iterator[tuple[ExampleBatch, Tensor]]:
    """Batches of a task's examples in a fixed order, each with the model's output, on the model's device; in evaluation
    mode, float32. users: what they are called while it lasts."""
    config = model.backbone.config
    most = max(1, MOST_SCORES // model.task(name).spec.num_outputs(config.num_items))
    with evaluating(model), progress(f"measuring {name}, {users}", len(examples), " examples") as bar:
        for rows in plan(examples, max_tokens=BATCH_TOKENS, max_len=config.max_len, seed=None):
            for part in rows.split(most):
                batch = make_batch(dataset, examples, part, config.max_len).to(model.device)
                yield batch, model(batch.history, name).float()
                bar.update(len(part))


@torch.no_grad()
def fit_head(model: UserModel, dataset: Dataset, name: str, max_examples: int = 20_000) -> None:
    """Start a new task's head at the base rates of its training data, on standardised features."""
    task, examples, max_len = model.task(name), dataset.examples(name, "train"), model.backbone.config.max_len
    if len(examples) > 2 * max_examples:  # planning all of them would take longer than what follows
        examples = drawn(examples, max_examples, seed=0)
    batches = iterate(dataset, examples, max_tokens=BATCH_TOKENS, max_len=max_len, seed=0)
    with evaluating(model):
        on_device = (batch.to(model.device) for batch in batches)
        fit_head_on(task, on_device, lambda history: model.encode(history, [name])[name], max_examples)


def fit_head_on(
    task: Task, batches: Iterable[ExampleBatch], read: Callable[[PackedBatch], Tensor], max_examples: int
) -> None:
    """Start a head on batches until these hold `max_examples`; read: histories -> what the head reads of them."""
    features, targets, count = [], [], 0
    for batch in batches:
        features.append(read(batch.history))
        targets.append(task.columns(batch.target))
        count += len(batch.history)
        if count >= max_examples:
            break
    task.fit_head(torch.cat(features), torch.cat(targets))


@contextmanager
def evaluating(model: UserModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after it, in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
