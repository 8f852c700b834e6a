"""UserModel: a frozen backbone and any number of tasks. A plain module; the training loop is its user's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from pcl_ext.batch import Ids, PackedBatch
from pcl_ext.model.answers import answer, as_rows, check_k
from pcl_ext.model.backbone import Backbone, NamedModules, freeze, is_frozen
from pcl_ext.model.config import BackboneConfig, MemoryConfig
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.many_tasks import encode_each, encode_rows, encode_state
from pcl_ext.model.memories import ContextualPrompt, hashed_text_vector
from pcl_ext.model.memories.contextual import TEXT_DIM
from pcl_ext.model.task_module import Task
from pcl_ext.model.user_state import UserState
from pcl_ext.task import TaskSpec


class UserModel(nn.Module):
    """A backbone over histories, and tasks that each own their prompts, readout and head.

    Tasks are numbered in the order in which they were added: `task_names`.

    removed  names of the closed tasks that `remove_task` has taken out: the next `save_pretrained` drops these of a
             run, and no others
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        if not isinstance(getattr(backbone, "config", None), BackboneConfig):  # what wraps a Backbone will do
            raise TypeError(
                f"backbone must be a pcl_ext.Backbone, got {type(backbone).__name__}; weights of another model are "
                "loaded into one where the layers are the same (docs/training-loop.md)"
            )
        self.backbone = backbone
        self.tasks = NamedModules()
        self.removed: set[str] = set()

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order in which they were added: `task_index` counts them."""
        return list(self.tasks)

    @property
    def device(self) -> torch.device:
        """Where the model is; batches are moved there by `batch.to(model.device)`."""
        return self.backbone.table.device

    def freeze_backbone(self) -> None:
        """Make the backbone's parameters buffers; pretraining ends with this."""
        freeze(self.backbone)

    @property
    def backbone_frozen(self) -> bool:
        """Whether the backbone has no parameters left, as `freeze_backbone` leaves it."""
        return is_frozen(self.backbone)

    def add_task(
        self,
        spec: TaskSpec,
        config: MemoryConfig | None = None,
        *,
        closed: bool = False,
        depends_on: Sequence[str] = (),
        text: Tensor | None = None,
    ) -> Task:
        """Start a task, of the backbone's dtype. With `closed` it is built empty, to be filled from a file.

        text [256], finite numbers, replaces the hashed vector of the task's description where a contextual prompt reads
        texts. ValueError where a task of that name is there, or its catalogue holds an item that the backbone does not
        know; TypeError where an argument is of another class.
        """
        for what, given, kind in (("spec", spec, TaskSpec), ("config", config, (MemoryConfig, type(None)))):
            if not isinstance(given, kind):
                wanted = "TaskSpec" if what == "spec" else "MemoryConfig"
                raise TypeError(f"{what} must be a {wanted}, got {type(given).__name__}")
        if spec.name in self.tasks:
            raise ValueError(f"task {spec.name!r} is there already; remove_task it first")
        config = config or MemoryConfig()
        text = hashed_text_vector(spec.description or spec.name) if text is None else _checked_text(text)
        if spec.kind == "items" and config.tied is None and not closed:
            self._warn_of_untrained(spec.name)
        task = Task(
            spec, config, self.backbone, self._earlier(spec.name, config, depends_on if closed else None), closed=closed
        )
        task.register_buffer("text", text)
        if config.contextual != "none" and not closed:
            task.context, task.depends_on = self._context(task), list(self._context_sources(config))
        if closed:
            task.depends_on = list(depends_on)
            task.freeze()
        self.tasks[spec.name] = task.to(self.backbone.table).train(self.training and not closed)
        return task

    def _warn_of_untrained(self, name: str) -> None:
        """A backbone pretrained elsewhere, of which nobody said what it knows."""
        backbone = self.backbone
        if not backbone.trained_items.any() and self.backbone_frozen:
            warnings.warn(
                f"task {name!r}: none of the frozen backbone's items is marked as trained, so the task gets an output "
                "table of its own, which starts from nothing; mark them first (backbone.trained_items[ids] = True), or "
                "say MemoryConfig(tied=False)",
                stacklevel=3,
            )

    def _earlier(self, name: str, config: MemoryConfig, names: Sequence[str] | None) -> list[Task]:
        """Tasks whose readouts a new one reads: those named, else all closed ones that read what it reads."""
        if "earlier" not in (config.readout or ()):
            return []
        if names is None:
            return [task for task in self.tasks.values() if task.closed and task.config.placement == "none"]
        if missing := [other for other in names if other not in self.tasks]:
            raise ValueError(f"task {name!r} reads task {missing[0]!r}, which is not there; restore that one first")
        return [self.tasks[other] for other in names]

    def _context_sources(self, config: MemoryConfig) -> list[str]:
        """Closed tasks that the contextual prompt of a new one reads."""
        closed = [name for name, task in self.tasks.items() if task.closed]
        if config.contextual == "texts":
            return closed
        same = [n for n in closed if self.tasks[n].config.placement == config.placement]
        return [n for n in same if self.tasks[n].config.prompt_len == config.prompt_len]

    def _context(self, task: Task) -> ContextualPrompt | None:
        """None where there is nothing to attend to: every parameter of an open task has its part in the loss."""
        config, shape = task.config, self.backbone.config
        sources = [self.tasks[name] for name in self._context_sources(config)]
        texts = torch.stack([source.text for source in sources] + [task.text.to(self.backbone.table)])
        prompts = None
        if config.contextual == "prompts":
            kind = "prefix" if config.placement == "prefix" else "tail"
            if not sources:
                return None
            prompts = torch.stack([source.memories[kind].rows for source in sources])
        return ContextualPrompt(texts, prompts, config.prompt_len, shape.dim, shape.num_heads)

    def freeze_task(self, name: str) -> None:
        """Close a task: fold its contextual prompt, turn its tensors into buffers. It never changes again.

        The keys and values of a prefix are computed here, once, and kept with the task. Raises ValueError while the
        backbone still learns: every step would change the task's outputs; and where the task holds tensors that are not
        its own, of an adapter or a parametrisation, which a run could not hold.
        """
        task = self.task(name)
        if not self.backbone_frozen:
            raise ValueError(f"task {name!r} cannot be closed while the backbone learns: call freeze_backbone() first")
        task.check_tensors()
        # what is kept is of the model's own dtype, and later tasks may learn from it
        with torch.autocast(self.device.type, enabled=False), torch.inference_mode(False):
            task.close()
            task.keep_prefix(self.backbone)

    def remove_task(self, name: str) -> None:
        """Forget a task. Raises where an open task is being made from it, or where one reads it for good."""
        closed = self.task(name).closed
        users = {other: task for other, task in self.tasks.items() if name in task.depends_on}
        if readers := [other for other, task in users.items() if "earlier" in task.memories]:
            raise ValueError(f"task {name!r} is read by: {', '.join(readers)}; remove them first")
        if learners := [other for other, task in users.items() if not task.closed]:
            raise ValueError(f"task {name!r} is read by open tasks: {', '.join(learners)}; close them first")
        del self.tasks[name]
        if closed:
            self.removed.add(name)

    def task(self, name: str) -> Task:
        """The task of this name; ValueError where there is none, TypeError for what is no name."""
        if not isinstance(name, str):
            hint = "; a task of each row is given as task_index=" if isinstance(name, Tensor) else ""
            raise TypeError(f"task must be a name, a str, got {type(name).__name__}{hint}")
        task = self.tasks.get(name)
        if task is None:
            raise ValueError(f"task must be one of {', '.join(self.tasks) or '(no tasks yet)'}, got {name!r}")
        return task

    def forward(
        self, batch: PackedBatch | UserState, task: str | None = None, *, task_index: Tensor | None = None
    ) -> Tensor | dict[str, tuple[Tensor, Tensor]]:
        """Outputs of a batch, for one task or for a task per row.

        task        a name -> output [B, C] (items: a column per item of the catalogue; classes) or [B]
                    (binary: logit; regression: value)
        task_index  [B] int64, places in `task_names` -> {name: (rows [b] int64, output [b, C] or [b])}; given on the
                    CPU, nothing is read from a GPU

        ValueError for a task that is not there, a batch on another device, a history longer than max_len or, on the
        CPU, an id past num_items; TypeError for what is no batch.
        """
        if (task is None) == (task_index is None):
            raise ValueError("give either task or task_index")
        _check_batch(batch)
        if task is not None and isinstance(batch, UserState):
            ((_, encoded),) = encode_state(batch, {task: self.task(task)})
            return self.task(task)(encoded, self.backbone.table)
        if isinstance(batch, UserState):
            raise ValueError("task_index takes a PackedBatch, got a UserState; give task, or read state.batch()")
        if task is not None:
            return self.task(task)(self.read(batch, task), self.backbone.table)
        names, index = torch.unique(self._check_task_index(batch, task_index), return_inverse=True)
        tasks = [self.tasks[self.task_names[place]] for place in names.tolist()]
        encoded = encode_rows(self.backbone, batch, tasks, index.to(self.device, non_blocking=True))
        outputs = {}
        for place, part in enumerate(tasks):
            rows = torch.nonzero(index == place)[:, 0]
            output = part(encoded.select(rows), self.backbone.table)
            outputs[part.spec.name] = (rows.to(self.device, non_blocking=True), output)
        return outputs

    if TYPE_CHECKING:  # of nn.Module it returns Any

        @overload
        def __call__(self, batch: PackedBatch | UserState, task: str) -> Tensor: ...

        @overload
        def __call__(self, batch: PackedBatch, *, task_index: Tensor) -> dict[str, tuple[Tensor, Tensor]]: ...

        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def member_outputs(self, batch: PackedBatch, task: str) -> list[Tensor]:
        """As `forward` for one task, but the output of each of its members (`MemoryConfig.members`), to be trained on a
        loss of its own; `forward` gives their mean."""
        return self.task(task).member_outputs(self.read(batch, task), self.backbone.table)

    def _check_task_index(self, batch: PackedBatch, index: Tensor) -> Tensor:
        """The index on the CPU: whose the rows are is what the host has to know."""
        if not isinstance(index, Tensor):
            raise TypeError(f"task_index must be a Tensor [{len(batch)}] int64, got {type(index).__name__}")
        if index.dtype != torch.int64 or index.shape != (len(batch),):
            raise ValueError(f"task_index must be [{len(batch)}] int64, got {list(index.shape)} {index.dtype}")
        index = index.cpu()
        if len(batch) and not 0 <= int(index.min()) <= int(index.max()) < len(self.tasks):
            worst = index[(index < 0) | (index >= len(self.tasks))][0]
            raise ValueError(f"task_index must be in 0..{len(self.tasks) - 1}, got {int(worst)}")
        return index

    def read(self, batch: PackedBatch, task: str) -> Encoded:
        """The histories of a batch as the readouts of a task see them."""
        return encode_rows(self.backbone, batch, [self.task(task)])

    def user_state(self, batch: PackedBatch, *, keep: int | None = None) -> UserState:
        """What is known of these users, to take new events by `extend` and to be read in place of a batch.

        States of all rows are held where a task of the model reads them. keep: see `UserState`. ValueError where the
        backbone's positions count from the end.
        """
        _check_batch(batch)
        every_state = any(task.every_state for task in self.tasks.values())
        return UserState.of(self.backbone, batch.to(self.device), every_state=every_state, keep=keep)

    def encode(self, batch: PackedBatch | UserState, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """User vectors [B, F] for each of the tasks (all by default): what its head reads, before it is standardised
        (by `task.shift` and `task.scale`).

        Tasks without a prefix share one pass over what no tail prompt reaches, and only their tails are computed task
        by task, at most TAIL_ROWS rows at once. A prefix is seen from every row of a history: such a task is a pass of
        its own.
        """
        if isinstance(tasks, str):
            raise TypeError(f"tasks must be a list of names, got the str {tasks!r}")
        _check_batch(batch)
        names = self.task_names if tasks is None else list(tasks)
        parts = {name: self.task(name) for name in names}
        known = isinstance(batch, UserState)
        each = encode_state(batch, parts) if known else encode_each(self.backbone, batch, parts)
        vectors = {name: parts[name].features(encoded) for name, encoded in each}
        return {name: vectors[name] for name in names}

    @torch.no_grad()
    def predict(self, histories: Sequence[Ids], task: str, k: int = 10) -> list[dict[str, Any]]:
        """Predictions for plain lists of item ids, oldest first: new users and empty histories included.

        items: {"items": [k ids], "scores": [k]}, equal scores by the lowest id; classes: {"class", "probabilities"},
        and "label" where the task names them; binary: {"probability"}; regression: {"value"}. The backbone reads
        the newest max_len ids, item memories all, and older ones count as seen; unknown ids are dropped, with a warning
        that counts. Past the catalogue k is all of it. All histories are one pass: for many of them, `Predictor` works
        in chunks. ValueError for a task that is not there, a k below 1, or a history that is no list of integers.
        """
        config, learning = self.backbone.config, [part for part in self.modules() if part.training]
        batch = PackedBatch.from_lists(histories, num_items=config.num_items, max_len=config.max_len)
        if batch.dropped:
            warnings.warn(f"{batch.dropped} unknown item ids were dropped from {len(batch)} histories", stacklevel=3)
        for part in learning:
            part.training = False
        try:
            return as_rows(answer(self, batch.to(self.device), task, check_k(k)))
        finally:
            for part in learning:
                part.training = True


def _checked_text(text: Tensor) -> Tensor:
    """A copy of what a task is described by, [TEXT_DIM] finite numbers."""
    if not isinstance(text, Tensor):
        raise TypeError(f"text must be a Tensor [{TEXT_DIM}], got {type(text).__name__}")
    if text.shape != (TEXT_DIM,) or not text.is_floating_point() or not bool(text.isfinite().all()):
        raise ValueError(f"text must be [{TEXT_DIM}] finite floating numbers, got {list(text.shape)} {text.dtype}")
    return text.detach().clone()


def _check_batch(batch: object) -> None:
    if not isinstance(batch, (PackedBatch, UserState)):
        kind = type(batch).__name__
        raise TypeError(f"batch must be a PackedBatch, say of PackedBatch.from_lists, or a UserState, got {kind}")
