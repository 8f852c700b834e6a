"""Pretraining and learning a task: plain functions over a plain module."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcl_ext import infer
from pcl_ext.data import Dataset, ExampleBatch, Examples, check_task, make_batch, plan
from pcl_ext.item_start import start_items
from pcl_ext.loop import LoopConfig, Problem, check_above_zero, fit, is_number
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, Task, UserModel
from pcl_ext.model.config import check_whole, is_whole, plain
from pcl_ext.next_item import NextItemLoss
from pcl_ext.row_adamw import RowAdamW
from pcl_ext.sampled_items import SampledItemsLoss
from pcl_ext.store import hash_tensor

_LOG = logging.getLogger(__name__)

RARE_EPS = 2e-4
LEAST_STEPS, LEAST_TOKENS = 20, 256  # of an epoch of a task, and of a step
MOST_PLANNED = 8  # times the examples that an epoch may read: of more, planning takes as long as training on some
NEXT = MemoryConfig(placement="none", readout=("last",), tied=True)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """What `pretrain` and `learn_task` add to the loop alike.

    Args:
        valid_examples: of more valid examples than this, so many are drawn by seed, once, and decide which epoch is
            kept; over a large catalogue fewer, at least 1,000 (`infer.MOST_JUDGED`); 0 takes all
        full_softmax: catalogues up to this size use the exact softmax
        negatives: larger ones a sampled softmax with logQ correction, with so many items drawn for each step
    """

    valid_examples: int = 20_000
    full_softmax: int = 20_000
    negatives: int = 4096

    def __post_init__(self):
        super().__post_init__()
        if not is_whole(self.valid_examples, 0):
            raise ValueError(
                f"valid_examples must be a whole number from 1 up, or 0 for all, got {self.valid_examples!r}"
            )
        check_whole(self, valid_examples=0, full_softmax=1, negatives=1)


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Settings of `pretrain`."""

    epochs: int = 30
    learning_rate: float = 5e-3


@dataclass(frozen=True)
class LearnConfig(TrainConfig):
    """Settings of `learn_task`; `learning_rate` is the one of prompts and other memories.

    Args:
        head_rate: learning rate of the head
        ridge: strengths of the ridge regression that an items task with a cold catalogue starts from; the valid users
            pick one, none starts it at random. The start is kept where training does not beat it
        ridge_rate: factor on both learning rates after such a start
    """

    epochs: int = 40
    learning_rate: float = 5e-3
    weight_decay: float = 1.0
    head_rate: float = 2e-3
    ridge: tuple[float, ...] = (3.0, 30.0, 1000.0)
    ridge_rate: float = 0.1  # at full rates range_b of online-retail falls to mrr@5 .087, at these .094

    def __post_init__(self):
        super().__post_init__()
        check_above_zero(self, "head_rate", "ridge_rate")
        strengths = self.ridge if isinstance(self.ridge, (tuple, list)) else [None]
        if not all(is_number(strength) and strength > 0 for strength in strengths):
            raise ValueError(f"ridge must be a list of strengths above 0, got {self.ridge!r}")
        object.__setattr__(self, "ridge", tuple(map(plain, self.ridge)))

    @property
    def least_epochs(self) -> int:
        """Half of `epochs`: so many a task is learned whatever the valid users say, as few of them say little."""
        return -(-self.epochs // 2)

    def step_tokens(self, events: int) -> int:
        """Fewer than `batch_tokens` where an epoch would have too few steps: patience counts epochs, and with a tenth
        of the labels of online-retail a memory had not learned what it could when they ended."""
        return min(self.batch_tokens, max(LEAST_TOKENS, -(-events // LEAST_STEPS)))


def pretrain(
    dataset: Dataset,
    backbone: BackboneConfig,
    config: PretrainConfig | None = None,
    checkpoint: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[UserModel, list[dict[str, Any]]]:
    """Next-item prediction over the train users' histories; returns a model with a frozen backbone and its curve.

    The model knows one task, "next", closed. The loss is taken at every position over all items; stops on the last
    item of the valid users. It starts from the same weights on every device, trains on `device` and stays there.
    With a checkpoint, a file, the same call goes on where it was interrupted. ValueError where the dataset breaks a
    promise (`data.check_task`), or is of another number of items than the backbone.
    """
    config = config or PretrainConfig()
    _check_types(dataset=(dataset, Dataset), backbone=(backbone, BackboneConfig), config=(config, PretrainConfig))
    _check_catalogue(dataset, backbone)
    check_task(dataset, "next")
    with _seeded(config.seed, torch.device(device)):
        model = UserModel(Backbone(backbone)).to(device)
        task = model.add_task(dataset.task("next").spec, NEXT)
        negatives = config.negatives if dataset.num_items > config.full_softmax else None
        loss = NextItemLoss(model.backbone, task, dataset, negatives)
        sequences = dataset.sequences("train", backbone.max_len)
        examples = _some(sequences, f"{dataset.path} has no train users with two events or more")
        _some(dataset.examples("next", "valid"), f"{dataset.path} has no valid users with a target of 'next'")
        judge = Judge(model, dataset, "next", config)
        _say_epoch("next", examples, config, backbone.max_len)

        def batches(epoch: int, start: int):
            return epoch_batches(dataset, examples, config, backbone.max_len + 1, epoch, start)

        identity = {"dataset": dataset.sha256, "backbone": backbone.to_json(), "config": asdict(config)}
        problem = Problem("next", batches, loss, judge, task.spec.metric, identity)
        steps = config.epochs * batches(0, 0)[0]
        optimizer = adamw([{"params": model.parameters(), "lr": config.learning_rate}], config, steps)
        curve = fit(model, optimizer, problem, config, checkpoint)
    epochs = 1 + max(entry["epoch"] for entry in curve if entry["best"])
    model.backbone.trained_items[(loss.counts > 0) & _items_read(dataset, batches, epochs, config)] = True
    model.freeze_backbone()
    model.freeze_task("next")
    return model, curve


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, what is random follows from the seed; after it, the CPU's generator and that of the device are as they
    were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _items_read(dataset: Dataset, batches: Callable, epochs: int, config: LoopConfig) -> Tensor:
    """[V + 1] bool: the items of all events that so many epochs read. Where `epoch_tokens` cuts none of them short, one
    reads everything."""
    read = torch.zeros(dataset.num_items + 1, dtype=torch.bool)
    if batches(0, 0)[0] < config.epoch_tokens // config.batch_tokens:
        return ~read
    for epoch in range(epochs):
        for batch in batches(epoch, 0)[1]:
            read[batch.history.items] = True
    return read


def learn_task(
    model: UserModel,
    dataset: Dataset,
    name: str,
    config: LearnConfig | None = None,
    memory: MemoryConfig | None = None,
    checkpoint: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Add the dataset's task `name` to a model with a frozen backbone, learn it, close it; returns the curve.

    What is validated after each epoch, and kept, is the average of the task's weights over the epochs so far, the e-th
    with weight e. For an items task the reported metric of the valid users picks the epoch; for labels, an epoch whose
    metric is within one standard error of the best so far replaces the one kept so far where its loss is less, or where
    that one's metric is no longer within it. Half of `config.epochs` are learned at least: of few valid users an early
    epoch may look good by chance. Not so where a ridge regression is the start, which few epochs beat.
    Where it raises, the model is left without the task; with a checkpoint, the same call goes on from there. ValueError
    where the task's table breaks a promise (`data.check_task`), say holds targets that the model sees.
    """
    config, memory = config or LearnConfig(), memory or MemoryConfig()
    _check_types(model=(model, UserModel), dataset=(dataset, Dataset))
    _check_types(config=(config, LearnConfig), memory=(memory, MemoryConfig))
    if not model.backbone_frozen:
        raise ValueError("learn_task needs a frozen backbone: pretrain one, or call model.freeze_backbone()")
    _check_catalogue(dataset, model.backbone.config)
    check_task(dataset, name)
    train, _ = (
        _some(dataset.examples(name, fold), f"{dataset.path} has no {fold} users with a target of {name!r}")
        for fold in ("train", "valid")
    )
    with _seeded(config.seed, model.device):
        task = model.add_task(dataset.task(name).spec, memory)
        _say_rows(task, model)
        try:
            curve = _learn(model, dataset, task, train, config, checkpoint)
            model.freeze_task(name)
        except BaseException:
            model.remove_task(name)
            raise
    return curve


def _learn(
    model: UserModel, dataset: Dataset, task: Task, train: Examples, config: LearnConfig, checkpoint: str | Path | None
) -> list[dict[str, Any]]:
    """Start the open task, then train it."""
    name, metric = task.spec.name, task.spec.metric
    infer.fit_head(model, dataset, name)
    judge = Judge(model, dataset, name, config)
    _say_epoch(name, train, config, model.backbone.config.max_len)
    ridge = task.cold and bool(config.ridge)
    if ridge and not (checkpoint is not None and Path(checkpoint).exists()):  # a checkpoint holds what came of it
        start_items(model, dataset, name, config.ridge, lambda: judge().metrics[metric])
    tensors = {key: hash_tensor(value) for key, value in model.backbone.state_dict().items()}
    identity = {"dataset": dataset.sha256, "table": dataset.task_sha256(name), "memory": asdict(task.config)}
    identity |= {"config": asdict(config), "backbone": tensors, "after": model.task_names[:-1]}
    if read := [earlier for earlier in model.task_names[:-1] if earlier in task.depends_on]:
        closed = {earlier: model.task(earlier).state_dict() for earlier in read}
        identity["made_of"] = {n: {key: hash_tensor(value) for key, value in t.items()} for n, t in closed.items()}
    batches, loss = _task_steps(model, dataset, task, train, config)
    problem = Problem(
        name,
        batches,
        loss,
        judge,
        metric,
        identity,
        keep_start=ridge,
        average=True,
        ties_by_loss=task.spec.kind != "items",
        least_epochs=0 if ridge else config.least_epochs,
    )
    groups = task_rates(task, config, config.ridge_rate if ridge else 1.0)
    optimizer = adamw(groups, config, config.epochs * batches(0, 0)[0])
    return fit(model, optimizer, problem, config, checkpoint)


def _task_steps(
    model: UserModel, dataset: Dataset, task: Task, train: Examples, config: LearnConfig
) -> tuple[Callable, Callable]:
    """`batches` and `loss` of a `Problem`. With all scores of a large catalogue a batch has few examples; with a sample
    of them it need not."""
    shape, kind = model.backbone.config, task.spec.kind
    sampled = kind == "items" and len(task.catalogue) > config.full_softmax
    most = None if sampled else max(1, infer.MOST_SCORES // task.spec.num_outputs(shape.num_items))
    if sampled and task.spec.repeats:
        most = _most_with_repeats(train, config)

    def batches(epoch: int, start: int) -> tuple[int, Iterator[ExampleBatch]]:
        return epoch_batches(dataset, train, config, shape.max_len, epoch, start, most)

    def loss(batch: ExampleBatch) -> Tensor:
        batch = batch.to(model.device)
        outputs, target = model.member_outputs(batch.history, task.spec.name), task.columns(batch.target)
        return sum(task.loss(output, target, batch.target_row) for output in outputs) / len(outputs)

    return batches, SampledItemsLoss(model, task, train, config.negatives) if sampled else loss


def _most_with_repeats(train: Examples, config: LearnConfig) -> int:
    """Examples of a batch of `SampledItemsLoss`, where each target has a score for all that was drawn, all that the
    batch holds and all its targets: MOST_SCORES in all, where examples have as many targets as they have on average."""
    others = config.negatives + config.batch_tokens
    targets = (math.sqrt(others**2 + 4 * infer.MOST_SCORES) - others) / 2
    return max(1, int(targets * len(train) / max(1, len(train.target))))


def adamw(groups: list[dict[str, Any]], config: LoopConfig, steps: int) -> RowAdamW:
    """AdamW for a run of `steps` steps at most, over torch's parameter groups; biases and norms do not decay.

    Weight decay, the configuration's where a group has none of its own, is normalised to 1,000 steps by
    sqrt(1000 / steps) (Loshchilov and Hutter, 2019, appendix B.1): one setting for small datasets and large ones.
    """
    parts = []
    for group in groups:
        parameters = list(group["params"])
        decay = group.get("weight_decay", config.weight_decay) * math.sqrt(1000 / steps)
        for decays in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == decays]
            parts.append(group | {"params": chosen, "weight_decay": decay if decays else 0.0})
    return RowAdamW([part for part in parts if part["params"]])


def task_rates(task: Task, config: LearnConfig, factor: float = 1.0) -> list[dict[str, Any]]:
    """Groups of a task's parameters for `adamw`.

    A label is one number a user, so a rare item has few and small gradients. Adam would move its row as far as a common
    item's; with RARE_EPS it moves in proportion to its gradient, of which each of several members
    has its share.
    """
    tables = task.item_tables()
    rest = [p for p in task.memory_parameters() if not any(p is table for table in tables)]
    rate, head_rate = config.learning_rate * factor, config.head_rate * factor
    groups = [{"params": rest, "lr": rate}, {"params": task.head_parameters(), "lr": head_rate}]
    if tables:
        eps = {"eps": RARE_EPS / task.config.members} if task.spec.kind != "items" else {}
        groups.append({"params": tables, "lr": rate} | eps)
    return groups


def epoch_batches(
    dataset: Dataset,
    examples: Examples,
    config: LoopConfig,
    max_len: int,
    epoch: int,
    start: int,
    most: int | None = None,
) -> tuple[int, Iterator[ExampleBatch]]:
    """(steps of an epoch, its batches from number `start` on): another order each epoch, the same for the same seed.

    most  examples of a batch: where each has a score for every item of a large catalogue
    """
    events = int(examples.cut.clamp(1, max_len).sum())
    tokens, share = config.step_tokens(events), 2 * config.epoch_tokens / events
    if share < 1 / MOST_PLANNED:
        examples = infer.drawn(examples, math.ceil(share * len(examples)), config.seed + epoch)
    groups = plan(examples, max_tokens=tokens, max_len=max_len, seed=config.seed + epoch)
    groups = groups[: max(1, config.epoch_tokens // tokens)]
    if most is not None:
        groups = [part for rows in groups for part in rows.chunk(-(-len(rows) // most))]
    return len(groups), (make_batch(dataset, examples, rows, max_len) for rows in groups[start:])


def _say_rows(task: Task, model: UserModel) -> None:
    """In the log, where a few untrained items make a task store rows for its whole catalogue."""
    if task.spec.kind != "items" or task.tied or task.cold:
        return
    known, count = int(model.backbone.trained_items[task.catalogue].sum()), len(task.catalogue)
    if task.config.tied is None:
        text = "%s: %s of its %s items were not trained in pretraining, so it stores output rows of its own, %.0f MB; "
        text += "memory tied = true scores against the frozen item table instead"
        size = count * model.backbone.config.dim * model.backbone.table.element_size() / 1e6
        _LOG.info(text, task.spec.name, f"{count - known:,}", f"{count:,}", size)


def _say_epoch(name: str, examples: Examples, config: LoopConfig, max_len: int) -> None:
    """In the log, where `epoch_tokens` leaves some of the events for later epochs."""
    events = int(examples.cut.clamp(1, max_len).sum())
    if events > config.epoch_tokens:
        text = "%s: an epoch reads %s of %s events, others each time (epoch_tokens), and there are %d epochs at most"
        _LOG.info(text, name, f"{config.epoch_tokens:,}", f"{events:,}", config.epochs)


def _some(examples: Examples, otherwise: str) -> Examples:
    if not len(examples):
        raise ValueError(f"{otherwise}: nothing to learn from")
    return examples


def _check_types(**given: tuple) -> None:
    """given: by name the argument and its class."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def _check_catalogue(dataset: Dataset, backbone: BackboneConfig) -> None:
    if dataset.num_items != backbone.num_items:
        raise ValueError(
            f"num_items of the backbone must be that of the dataset, got {backbone.num_items} and {dataset.num_items}"
        )


class Judge:
    """How one task does on the valid users: the same examples at every call, at most `config.valid_examples` of them,
    and of a large catalogue so few that an epoch is not measured for longer than it is trained.

    A sample without targets of both classes has no AUC: then all are taken.
    """

    def __init__(self, model: UserModel, dataset: Dataset, name: str, config: TrainConfig):
        self.model, self.dataset, self.name = model, dataset, name
        self.examples = dataset.examples(name, "valid")
        columns = model.task(name).spec.num_outputs(dataset.num_items)
        most = min(config.valid_examples, max(infer.FEWEST, infer.MOST_JUDGED // columns))
        if 0 < most < len(self.examples):
            some = infer.drawn(self.examples, most, config.seed)
            if model.task(name).spec.metric != "auc" or some.target.min() < some.target.max():
                self.examples = some

    def __call__(self) -> infer.Score:
        return infer.measure(self.model, self.dataset, self.name, self.examples, "valid users")
