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
from pcl_ext.model.heads import ItemsHead, LabelHead, RepeatScores, TiedItemsHead, task_loss, wide
from pcl_ext.model.layout import LayerPrefix
from pcl_ext.model.members import OWN, Member, fold, folded_width
from pcl_ext.model.memories import (
    ContextualPrompt,
    EarlierReadouts,
    ItemMemory,
    LastState,
    LearnedPool,
    LowRankPrompts,
    MeanStates,
    Memory,
    PrefixPrompt,
    TailPrompt,
)
from pcl_ext.task import TaskSpec

COLD_WIDTH = 128  # a regression of this rank ranks nearly as the whole one does
KEPT = ("prefix_keys", "prefix_values")


class Task(nn.Module):
    """Memories and head of one task, open (trainable) until `close` folds and freezes it.

    earlier     closed tasks whose readouts this one reads, where its configuration says so
    closed      builds the shapes of a task that is closed, to be filled from a file
    depends_on  names of the tasks that it was made from: these, or those its contextual prompt attended to
    fixed       [F] bool, which features are standardised: (feature - shift) * scale, [F] each
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
        self.spec, self.config, self.closed = spec, config, False
        self.depends_on = [task.spec.name for task in earlier]
        self.memories = NamedModules()
        self.shape = shape = backbone.config
        if config.placement in ("tail", "both"):
            self.memories["tail"] = TailPrompt(config.prompt_len, shape.dim)
        if config.placement in ("prefix", "both"):
            self.memories["prefix"] = PrefixPrompt(config.prompt_len, shape.dim)
        if config.low_rank:
            self.memories["low_rank"] = LowRankPrompts(backbone, config.low_rank)
        self.ranked = Catalogue(spec, shape.num_items) if spec.kind == "items" else None
        self.tied = spec.kind == "items" and self._is_tied(backbone)
        self.cold = spec.kind == "items" and self._is_cold(backbone)
        members = config.members if spec.kind != "items" else 1
        for name in config.readout or self._default_readout():
            self.memories[name] = self._readout(name, earlier, closed)
        self.context: ContextualPrompt | None = None
        self.repeats = RepeatScores(shape.dim) if spec.repeats else None
        self.dropout = nn.Dropout(config.dropout)
        fixed = self._list_fixed()
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("shift", torch.zeros(len(fixed)))
        self.register_buffer("scale", torch.ones(len(fixed)))
        self.head = self._build_head(backbone)
        self.others = nn.ModuleList()
        for _ in range(0 if closed else members - 1):
            own = {name: self._readout(name, (), False) for name in self.memories if name in OWN}
            self.others.append(Member(own, self._build_head(backbone)))

    def _default_readout(self) -> tuple[str, ...]:
        if self.spec.kind != "items":
            return ("last", "mean", "item_memory")
        return ("last",) if self.tied else ("last", "item_memory")

    def _list_fixed(self) -> Tensor:
        """[F] bool, which features are standardised."""
        fixed = [memory.standardise for memory in self.memories.values() for _ in range(memory.num_features)]
        return torch.tensor(fixed, dtype=torch.bool)

    def _readout(self, name: str, earlier: Sequence[Task], closed: bool) -> Memory:
        config, shape = self.config, self.shape
        if name == "last":
            return LastState(shape)
        if name == "mean":
            return MeanStates(shape)
        if name == "pooled":
            return LearnedPool(shape, self._width(name, config.pooled_units, closed), config.item_dropout)
        if name == "earlier":
            return EarlierReadouts(shape, earlier, config.earlier_units)
        width = config.item_width or self._item_width()
        return ItemMemory(shape.num_items, self._width(name, width, closed), config.item_dropout, config.item_rows)

    def _item_width(self) -> int:
        if self.spec.kind != "items":
            return max(16, 2 * self.spec.num_outputs(self.shape.num_items))  # fewer could not tell many classes apart
        return COLD_WIDTH if self.cold else self.shape.dim

    def _width(self, name: str, width: int, closed: bool) -> int:
        if self.spec.kind == "items" or not closed:
            return width
        return folded_width(name, width, self.config.members, self.spec.num_outputs(0))

    @property
    def catalogue(self) -> Tensor:
        """[C] int64, the items that an items task ranks, in column order."""
        return self.ranked.items

    def _is_tied(self, backbone: Backbone) -> bool:
        """Whether items are scored against the frozen table."""
        return bool(backbone.trained_items[self.catalogue].all()) if self.config.tied is None else self.config.tied

    def _is_cold(self, backbone: Backbone) -> bool:
        """Whether an item memory has to do what the backbone cannot: most of the catalogue was never trained."""
        readout = self.config.readout or self._default_readout()
        share = backbone.trained_items[self.catalogue].double().mean()
        return not self.tied and "item_memory" in readout and float(share) < 0.5

    def _build_head(self, backbone: Backbone) -> nn.Module:
        num_features = len(self.fixed)
        if self.spec.kind != "items":
            return LabelHead(num_features, self.spec.num_outputs(backbone.config.num_items))
        if self.tied:
            return TiedItemsHead(num_features, backbone.config.dim, len(self.catalogue))
        table, trained = backbone.table.detach()[self.catalogue], backbone.trained_items[self.catalogue]
        if self.cold:
            width = self.memories["item_memory"].num_features
            table, trained = table.new_zeros(len(table), width), torch.zeros_like(trained)
        return ItemsHead(table, trained, ~self.fixed)

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

    def layer_prefix(self, backbone: Backbone) -> LayerPrefix | None:
        """Keys and values of the prefix in every layer of the backbone, as they are kept or computed now; or None."""
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
        """Store keys and values of the prefix, [num_layers, P, H, d] each; nothing where there is no prefix."""
        for name in KEPT:
            self._buffers.pop(name, None)
        prefix = self.layer_prefix(backbone)
        if prefix is not None:
            for name, rows in zip(KEPT, (prefix.keys, prefix.values)):
                self.register_buffer(name, torch.stack(rows))

    def columns(self, target: Tensor) -> Tensor:
        """Targets as the head's output numbers them: item ids [m] become columns of the catalogue.

        An id that is not in it, -100 for one, raises ValueError where the targets are on the CPU; on CUDA nobody looks,
        and `task_loss` is NaN.
        """
        return target if self.ranked is None else self.ranked.columns(target)

    def memory_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the head."""
        head = {id(p) for p in self.head_parameters()}
        return [p for p in self.parameters() if id(p) not in head]

    def head_parameters(self) -> list[nn.Parameter]:
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
        parts = [memory.features(encoded) for memory in self.memories.values() if memory.num_features]
        return torch.cat(parts, dim=1)

    def forward(self, encoded: Encoded, table: Tensor) -> Tensor:
        """Histories read for this task, and the item table [V + 1, D] -> output [B, C], or [B] for one number.

        Where targets are new items (`spec.repeats` is False), what the history holds already scores SEEN_SCORE.
        """
        outputs = self.member_outputs(encoded, table)
        return outputs[0] if len(outputs) == 1 else sum(outputs) / len(outputs)

    def member_outputs(self, encoded: Encoded, table: Tensor) -> list[Tensor]:
        """The output of each member; `forward` is their mean, and each learns from a loss of its own."""
        if self.spec.kind == "items":
            return [self.item_scores(self.queries(encoded), encoded, table)]
        encoded = self.reread(encoded)
        shared = {name: m.features(encoded) for name, m in self.memories.items() if m.num_features and name not in OWN}
        outputs = []
        for part in (self, *self.others):
            names = [name for name, memory in self.memories.items() if memory.num_features]
            read = [shared[name] if name in shared else part.memories[name].features(encoded) for name in names]
            output, unit = part.head(self._head_features(torch.cat(read, 1))), part.head.unit
            outputs.append(output if self.spec.kind == "classes" else output[:, 0] * unit[1] + unit[0])
        return outputs

    def _head_features(self, features: Tensor) -> Tensor:
        """Standardised, some left out while the task learns."""
        features = (features - self.shift) * self.scale
        return torch.where(self.fixed, self.dropout(features), features)

    def loss(self, output: Tensor, target: Tensor, target_row: Tensor) -> Tensor:
        """`task_loss`, with a regression in units of its targets' deviation, as `fit_head` has measured it.

        Adam's eps and weight decay are absolute: so the task learns the same whatever unit its targets are given in.
        """
        if self.spec.kind == "regression":
            output, deviation = wide(output), self.head.unit[1]
            output, target = output / deviation, target.to(output.dtype) / deviation
        return task_loss(self.spec, output, target, target_row)

    def queries(self, encoded: Encoded) -> Tensor:
        """[B, width of the rows], what the items of an items task are scored against."""
        encoded = self.reread(encoded)
        return self.head.queries(self._head_features(self._features(encoded)), encoded.newest)

    def item_scores(
        self, queries: Tensor, encoded: Encoded, table: Tensor, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Scores [B, c] of the catalogue's columns first .. last (all by default) for queries [B, D]."""
        catalogue = self.catalogue[first:last]
        if self.tied:
            rows = table[1:][first:last] if self.spec.catalogue is None else table[catalogue]
        else:
            rows = self.head.rows[first:last]
        scores = F.linear(queries, rows, self.head.bias[first:last])
        if self.repeats is None:
            return self.ranked.rank_last(scores, encoded, first)
        for piece in encoded.pieces:
            columns = self.ranked.among(piece.items, first, len(catalogue))
            scores = self.repeats(scores, piece.states[-1], piece.users(), columns)
        return scores

    @torch.no_grad()
    def fit_head(self, features: Tensor, target: Tensor) -> None:
        """Start the head at the training data's own base rates, on standardised features.

        features [n, F] of some training histories, target [m], all their targets as `columns` gives them. The base rate
        of a binary task is the mean of its targets, which may lie between 0 and 1. ValueError where there are none, one
        is not finite or not a class or column, shapes are others, or the task is closed.
        """
        self._check_open()
        self._check_fit(features, target)
        deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
        self.shift.copy_(torch.where(self.fixed, mean, 0.0))
        self.scale.copy_(torch.where(self.fixed, 1.0 / deviation.clamp_min(1e-3), 1.0))
        if self.spec.kind == "items":
            counts = torch.bincount(target.long(), minlength=self.head.bias.numel()).double() + 1.0
            self.head.bias.copy_((counts / counts.mean()).log())
            return
        for part in (self, *self.others):
            part.head.fit(self.spec.kind, target)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"task {self.spec.name!r} is closed and never changes: remove it to learn it anew")

    def _check_fit(self, features: Tensor, target: Tensor) -> None:
        name = self.spec.name
        for what, values, rest in (("features", features, [len(self.fixed)]), ("targets", target, [])):
            if not isinstance(values, Tensor):
                raise TypeError(f"{what} of task {name!r} must be a Tensor, got {type(values).__name__}")
            if values.dim() == 0 or list(values.shape[1:]) != rest:
                wanted = ", ".join(map(str, ["n", *rest]))
                raise ValueError(f"{what} of task {name!r} must be [{wanted}], got {list(values.shape)}")
        if not len(features) or not len(target):
            raise ValueError(
                f"task {name!r} must be fitted to at least one history and one target, got {len(features)} and "
                f"{len(target)}; leave fit_head out to start at zero"
            )
        for what, values in (("features", features), ("targets", target)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise ValueError(f"{what} of task {name!r} must be finite, got NaN or infinity; leave such rows out")
        low, high = (float(value) for value in target.aminmax())
        top = 1 if self.spec.kind == "binary" else self.spec.num_outputs(self.shape.num_items) - 1
        if self.spec.kind != "regression" and not 0 <= low <= high <= top:
            raise ValueError(f"targets of task {name!r} must be in 0..{top}, got {low:g} to {high:g}")

    @torch.no_grad()
    def start_items(self, table: Tensor, rows: Tensor, bias: Tensor) -> None:
        """Start a cold items task with this item memory [R, width], output rows [C, width] and bias [C].

        ValueError where it is closed.
        """
        self._check_open()
        names = [name for name, memory in self.memories.items() for _ in range(memory.num_features)]
        self.memories["item_memory"].table.copy_(table)
        self.head.start(rows, bias, torch.tensor([name == "item_memory" for name in names]).nonzero()[:, 0])

    def close(self) -> None:
        """Fold the contextual prompt into the stored one and the members into one, and freeze everything, for good."""
        if self.context is not None:
            with torch.no_grad():
                rows = self.context()
                for placement in ("tail", "prefix"):
                    if placement in self.memories:
                        self.memories[placement].rows += rows
            self.context = None
        if self.spec.kind != "items":
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
        shared = {name: memory for name, memory in self.memories.items() if memory.num_features}
        parts = zip(self._blocks(self.shift), self._blocks(self.scale))
        kept = {name: part for name, part in zip(shared, parts)}
        one = fold(
            shared,
            [Member(self.memories, self.head), *self.others],
            lambda name: self._readout(name, (), True).to(self.shift),
        )
        for name, memory in one.memories.items():
            self.memories[name] = memory
            kept[name] = (self.shift.new_zeros(memory.num_features), self.scale.new_ones(memory.num_features))
        self.head, self.others = one.head, nn.ModuleList()
        self.fixed = self._list_fixed().to(self.shift.device)
        self.shift, self.scale = (torch.cat(parts) for parts in zip(*kept.values()))

    def _blocks(self, features: Tensor) -> tuple[Tensor, ...]:
        """features [F] memory by memory."""
        return features.split([memory.num_features for memory in self.memories.values() if memory.num_features])
