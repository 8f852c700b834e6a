"""Task: everything one task stores, its memories and its head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.model.backbone import Backbone, NamedModules, freeze
from pcl_ext.model.catalogue import Catalogue
from pcl_ext.model.config import MemoryConfig
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.heads import RepeatScores
from pcl_ext.model.layout import LayerPrefix
from pcl_ext.model.loss import check_fit, task_loss, wide
from pcl_ext.model.members import OWN, Member, fold
from pcl_ext.model.memories import ContextualPrompt, Memory
from pcl_ext.model.task_parts import ItemsParts, LabelParts, prompts
from pcl_ext.task import TaskSpec

KEPT = ("prefix_keys", "prefix_values")


class Task(nn.Module):
    """Memories and head of one task, open (trainable) until `close` folds and freezes it.

    earlier     closed tasks whose readouts this one reads, where its configuration says so
    closed      builds the shapes of a task that is closed, to be filled from a file
    depends_on  names of the tasks that it was made from: these, or those its contextual prompt attended to
    fixed       [F] bool, which features are standardised: (feature - shift) * scale, [F] each
    ranked      what an items task ranks; None for labels
    tied, cold  of an items task: see `ItemsParts`
    others      of a label task that is open: its members but for the first, which is the task itself
    tensors     names of its tensors as it was made, without its text and contextual prompt
    """

    fixed: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        config: MemoryConfig,
        backbone: Backbone,
        earlier: Sequence[Task] = (),
        *,
        closed: bool = False,
    ):
        super().__init__()
        self.spec, self.config, self.shape, self.closed = spec, config, backbone.config, False
        self.depends_on = [task.spec.name for task in earlier]
        self.memories = NamedModules(prompts(config, backbone))
        self.ranked: Catalogue | None = None
        if spec.kind == "items":
            self.ranked = Catalogue(spec, self.shape.num_items)
            parts = ItemsParts(self.ranked, config, backbone)
        else:
            parts = LabelParts(spec, config, self.shape, closed=closed)
        self.tied, self.cold = parts.tied, parts.cold
        self.memories.update({name: parts.readout(name, earlier) for name in parts.readouts})
        self.context: ContextualPrompt | None = None
        self.repeats = RepeatScores(self.shape.dim) if spec.repeats else None
        self.dropout = nn.Dropout(parts.dropout)
        fixed = self._list_fixed()
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("shift", torch.zeros(len(fixed)))
        self.register_buffer("scale", torch.ones(len(fixed)))
        self.head = parts.head(fixed)
        self.others = nn.ModuleList()
        for _ in range(parts.members - 1):
            own = {name: parts.readout(name) for name in self.memories if name in OWN}
            self.others.append(Member(own, parts.head(fixed)))
        self.tensors = frozenset(self.state_dict())

    def _list_fixed(self) -> Tensor:
        """[F] bool, which features are standardised."""
        fixed = [memory.standardise for memory in self.memories.values() for _ in range(memory.num_features)]
        return torch.tensor(fixed, dtype=torch.bool)

    def _read(self) -> dict[str, Memory]:
        """The memories that the head reads, in its order."""
        return {name: memory for name, memory in self.memories.items() if memory.num_features}

    def tail(self) -> Tensor | None:
        """[P, D] added to the newest rows, the contextual prompt included while the task is open; None if P is 0."""
        return self._prompt("tail")

    def prefix(self) -> Tensor | None:
        """[P, D] in front of a history, the contextual prompt included while the task is open; None if P is 0."""
        return self._prompt("prefix")

    def _prompt(self, placement: str) -> Tensor | None:
        memory = self.memories.get(placement)
        if memory is None:
            return None
        rows = getattr(memory, placement)()
        if not rows.shape[0]:
            return None
        return rows if self.context is None else rows + self.context()

    @property
    def has_prefix(self) -> bool:
        """Whether the rows of a history see some of the task's in front of it."""
        return self.config.placement in ("prefix", "both", "layers") and self.config.prompt_len > 0

    def layer_prefix(self, backbone: Backbone) -> LayerPrefix | None:
        """Keys and values of the prefix in every layer of the backbone, as they are learned, kept or computed now; or
        None."""
        if "layers" in self.memories:
            return self.memories["layers"].layer_prefix()
        rows = self.prefix()
        if rows is None:
            return None
        offsets = torch.arange(2, device=rows.device) * len(rows)
        if not self.keeps_prefix:
            return backbone.prefix(rows, offsets)
        return LayerPrefix(list(self.prefix_keys), list(self.prefix_values), offsets)

    @property
    def keeps_prefix(self) -> bool:
        """Whether keys and values of its prefix are stored with the task."""
        return "prefix_keys" in self._buffers

    @torch.no_grad()
    def keep_prefix(self, backbone: Backbone) -> None:
        """Store keys and values of the prefix, [num_layers, P, H, d] each; nothing where there are none to compute."""
        for name in KEPT:
            self._buffers.pop(name, None)
        prefix = self.layer_prefix(backbone)
        if prefix is not None and "layers" not in self.memories:
            for name, rows in zip(KEPT, (prefix.keys, prefix.values)):
                self.register_buffer(name, torch.stack(rows))

    def memory_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the head: prompts, readouts and item memory. ValueError where the task is closed."""
        head = {id(p) for p in self.head_parameters()}
        return [p for p in self.parameters() if id(p) not in head]

    def head_parameters(self) -> list[nn.Parameter]:
        """Weights and biases of the head, of all its members. ValueError where the task is closed."""
        self._check_open()
        return [p for part in (self, *self.others) for p in part.head.parameters()]

    def item_tables(self) -> list[nn.Parameter]:
        """Tables of the item memories."""
        parts = [part.memories["item_memory"] for part in (self, *self.others) if "item_memory" in part.memories]
        return [part.table for part in parts]

    @property
    def every_state(self) -> bool:
        """Whether this task reads the states of all rows of a history, not the newest ones alone."""
        for memory in self.memories.values():
            if memory.every_state:
                return True
        return self.repeats is not None

    def reread(self, encoded: Encoded) -> Encoded:
        """The histories as this task's readouts see them."""
        for memory in self.memories.values():
            encoded = memory.reread(encoded) or encoded
        return encoded

    def features(self, encoded: Encoded) -> Tensor:
        """[B, F], what the head reads; of several members the first one's."""
        return self._features(self.reread(encoded))

    def standardised(self, encoded: Encoded) -> Tensor:
        """[B, F], the features as the head takes them."""
        return (self.features(encoded) - self.shift) * self.scale

    def _features(self, encoded: Encoded) -> Tensor:
        return torch.cat([memory.features(encoded) for memory in self._read().values()], dim=1)

    def forward(self, encoded: Encoded, table: Tensor) -> Tensor:
        """Histories read for this task, and the item table [V + 1, D] -> output [B, C], or [B] for one number.

        Where targets are new items (`spec.repeats` is False), what the history holds already scores SEEN_SCORE.
        """
        outputs = self.member_outputs(encoded, table)
        return outputs[0] if len(outputs) == 1 else sum(outputs) / len(outputs)

    def member_outputs(self, encoded: Encoded, table: Tensor) -> list[Tensor]:
        """The output of each member; `forward` is their mean, and each learns from a loss of its own."""
        if self.ranked is not None:
            return [self.item_scores(self.queries(encoded), encoded, table)]
        encoded, read = self.reread(encoded), self._read()
        shared = {name: memory.features(encoded) for name, memory in read.items() if name not in OWN}
        outputs = []
        for part in (self, *self.others):
            features = [shared[name] if name in shared else part.memories[name].features(encoded) for name in read]
            outputs.append(part.head.answer(self.spec.kind, self._head_features(torch.cat(features, 1))))
        return outputs

    def _head_features(self, features: Tensor) -> Tensor:
        """Standardised, some left out while the task learns."""
        features = (features - self.shift) * self.scale
        return torch.where(self.fixed, self.dropout(features), features)

    def loss(self, output: Tensor, target: Tensor, target_row: Tensor) -> Tensor:
        """`task_loss`, with a regression in units of its targets' deviation, as `fit_head` has measured it.

        Adam's eps and weight decay are absolute: so the task learns the same whatever unit its targets are given in.
        Arguments and errors are those of `task_loss`.
        """
        if self.spec.kind == "regression" and isinstance(output, Tensor) and isinstance(target, Tensor):
            output, deviation = wide(output), self.head.unit[1]
            output, target = output / deviation, target.to(output.dtype) / deviation
        return task_loss(self.spec, output, target, target_row)

    @property
    def catalogue(self) -> Tensor:
        """[C] int64, the items that an items task ranks, in column order; ValueError for a task of another kind."""
        if self.ranked is None:
            raise ValueError(f"catalogue is of items tasks only, task {self.spec.name!r} is {self.spec.kind}")
        return self.ranked.items

    def columns(self, target: Tensor) -> Tensor:
        """Targets as the head's output numbers them: item ids [m] become columns of the catalogue.

        An id that is not in it, -100 for one, raises ValueError where the targets are on the CPU; on CUDA nobody looks,
        and `task_loss` is NaN.
        """
        return target if self.ranked is None else self.ranked.columns(target)

    def queries(self, encoded: Encoded) -> Tensor:
        """[B, width of the rows], what the items of an items task are scored against."""
        encoded = self.reread(encoded)
        return self.head.queries(self._head_features(self._features(encoded)), encoded.newest)

    def item_scores(
        self, queries: Tensor, encoded: Encoded, table: Tensor, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Scores [B, c] of the catalogue's columns first .. last (all by default) for queries [B, D]."""
        rows = self.ranked.rows_of(table, first, last) if self.tied else self.head.rows[first:last]
        scores = F.linear(queries, rows, self.head.bias[first:last])
        if self.repeats is None:
            return self.ranked.rank_last(scores, encoded, first)
        return self.repeats.add_votes(scores, encoded, self.ranked, first)

    @torch.no_grad()
    def start_items(self, table: Tensor, rows: Tensor, bias: Tensor) -> None:
        """Start a cold items task with this item memory [R, width], output rows [C, width] and bias [C].

        ValueError where it is closed.
        """
        self._check_open()
        names = [name for name, memory in self._read().items() for _ in range(memory.num_features)]
        self.memories["item_memory"].table.copy_(table)
        self.head.start(rows, bias, torch.tensor([name == "item_memory" for name in names]).nonzero()[:, 0])

    @torch.no_grad()
    def fit_head(self, features: Tensor, target: Tensor) -> None:
        """Start the head at the training data's own base rates, on standardised features.

        features [n, F] of some training histories, target [m], all their targets as `columns` gives them. The base rate
        of a binary task is the mean of its targets, which may lie between 0 and 1. ValueError where there are none, one
        is not finite or not a class or column, shapes are others, the task's dtype does not hold a regression's mean
        and deviation, or the task is closed.
        """
        self._check_open()
        columns = self.spec.num_outputs(self.shape.num_items)
        check_fit(self.spec, features, target, width=len(self.fixed), columns=columns)
        for part in (self, *self.others):
            part.head.fit(self.spec.kind, target)
        deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
        self.shift.copy_(torch.where(self.fixed, mean, 0.0))
        self.scale.copy_(torch.where(self.fixed, 1.0 / deviation.clamp_min(1e-3), 1.0))

    def check_tensors(self) -> None:
        """ValueError where an open task has other tensors than it was made with."""
        names = {name for name in self.state_dict() if name != "text" and not name.startswith("context.")}
        if not self.closed and (other := sorted(names ^ self.tensors)):
            raise ValueError(
                f"task {self.spec.name!r} cannot be closed: {', '.join(other[:3])} are not the tensors it was made "
                "with; merge adapters and parametrisations (torch.nn.utils.parametrize.remove_parametrizations) first"
            )

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"task {self.spec.name!r} is closed and never changes: remove it to learn it anew")

    def close(self) -> None:
        """Fold the contextual prompt into the stored one and the members into one, and freeze everything, for good."""
        if self.context is not None:
            with torch.no_grad():
                rows = self.context()
                for placement in ("tail", "prefix"):
                    if placement in self.memories:
                        self.memories[placement].rows += rows
            self.context = None
        if self.ranked is None:
            self._fold_members()
        self.freeze()

    def train(self, mode: bool = True) -> Task:
        """As nn.Module.train, but a closed task stays in evaluation mode: no dropout, whoever asks."""
        return super().train(mode and not self.closed)

    def freeze(self) -> None:
        """Make everything buffers: what `close` ends with, and all that a task loaded from a file needs."""
        freeze(self)
        self.closed = True

    @torch.no_grad()
    def _fold_members(self) -> None:
        """Make one of the members of a label task; what they shared stays as it was standardised."""
        read, folded = self._read(), LabelParts(self.spec, self.config, self.shape, closed=True)
        members = [Member(self.memories, self.head), *self.others]
        one = fold(read, members, lambda name: folded.readout(name).to(self.shift))
        sizes = [memory.num_features for memory in read.values()]
        kept = dict(zip(read, zip(self.shift.split(sizes), self.scale.split(sizes))))
        for name, memory in one.memories.items():
            self.memories[name] = memory
            kept[name] = (self.shift.new_zeros(memory.num_features), self.scale.new_ones(memory.num_features))
        self.head, self.others = one.head, nn.ModuleList()
        self.fixed = self._list_fixed().to(self.shift.device)
        self.shift, self.scale = (torch.cat(blocks) for blocks in zip(*kept.values()))
