"""Task: everything one task stores, its memories and its head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.model.backbone import Backbone, NamedModules, freeze
from pcl_ext.model.config import BackboneConfig, MemoryConfig
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.heads import ItemsHead, LabelHead, RepeatScores, TiedItemsHead
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

SEEN_SCORE = -1e9  # finite, so that a ranking of everything stays possible


class Task(nn.Module):
    """Memories and head of one task, open (trainable) until `close` folds and freezes it.

    earlier     closed tasks whose readouts this one reads, where its configuration says so
    depends_on  names of the tasks that it was made from: these, or those its contextual prompt attended to
    """

    def __init__(self, spec: TaskSpec, config: MemoryConfig, backbone: Backbone, earlier: Sequence[Task] = ()):
        super().__init__()
        self.spec, self.config, self.closed = spec, config, False
        self.depends_on = [task.spec.name for task in earlier]
        self.memories = NamedModules()
        shape = backbone.config
        if config.placement in ("tail", "both"):
            self.memories["tail"] = TailPrompt(config.prompt_len, shape.dim)
        if config.placement in ("prefix", "both"):
            self.memories["prefix"] = PrefixPrompt(config.prompt_len, shape.dim)
        if config.low_rank:
            self.memories["low_rank"] = LowRankPrompts(backbone, config.low_rank)
        self.tied = spec.kind == "items" and self._is_tied(backbone)
        for name in config.readout or self._default_readout():
            self.memories[name] = self._readout(name, shape, earlier)
        self.context: ContextualPrompt | None = None
        self.repeats = RepeatScores(shape.dim) if spec.repeats else None
        self.dropout = nn.Dropout(config.dropout)
        fixed = [memory.standardise for memory in self.memories.values() for _ in range(memory.num_features)]
        self.register_buffer("fixed", torch.tensor(fixed, dtype=torch.bool), persistent=False)
        self.register_buffer("shift", torch.zeros(len(fixed)))
        self.register_buffer("scale", torch.ones(len(fixed)))
        self.head = self._build_head(backbone)

    def _default_readout(self) -> tuple[str, ...]:
        if self.spec.kind != "items":
            return ("last", "mean", "item_memory")
        return ("last",) if self.tied else ("last", "item_memory")

    def _readout(self, name: str, shape: BackboneConfig, earlier: Sequence[Task]) -> Memory:
        if name == "last":
            return LastState(shape)
        if name == "mean":
            return MeanStates(shape)
        if name == "pooled":
            return LearnedPool(shape, self.config.pooled_units, self.config.item_dropout)
        if name == "earlier":
            return EarlierReadouts(shape, earlier, self.config.earlier_units)
        width = self.config.item_width or (shape.dim if self.spec.kind == "items" else 16)
        return ItemMemory(shape.num_items, width, self.config.item_dropout, self.config.item_rows)

    def _is_tied(self, backbone: Backbone) -> bool:
        """Whether items are scored against the frozen table; lists the catalogue and its columns."""
        num_items = backbone.config.num_items
        columns = self.spec.num_outputs(num_items)
        ids = range(1, columns + 1) if self.spec.catalogue is None else self.spec.catalogue
        self.register_buffer("catalogue", torch.tensor(list(ids), dtype=torch.int64), persistent=False)
        if int(self.catalogue.max()) > num_items:
            raise ValueError(
                f"catalogue of task {self.spec.name!r} names item {int(self.catalogue.max())}, the backbone knows "
                f"items 1..{num_items}"
            )
        column_of = torch.full((num_items + 1,), -1, dtype=torch.int64)
        column_of[self.catalogue] = torch.arange(columns)
        self.register_buffer("column_of", column_of, persistent=False)
        return bool(backbone.trained_items[self.catalogue].all()) if self.config.tied is None else self.config.tied

    def _build_head(self, backbone: Backbone) -> nn.Module:
        num_features = len(self.fixed)
        if self.spec.kind != "items":
            return LabelHead(num_features, self.spec.num_outputs(backbone.config.num_items))
        if self.tied:
            return TiedItemsHead(num_features, backbone.config.dim, len(self.catalogue))
        trained = backbone.trained_items[self.catalogue]
        return ItemsHead(backbone.table.detach()[self.catalogue], trained, ~self.fixed)

    def tail(self) -> Tensor | None:
        """[P, D] added to the newest embeddings, the contextual prompt included while the task is open."""
        return self._prompt("tail")

    def prefix(self) -> Tensor | None:
        """[P, D] in front of a history, the contextual prompt included while the task is open."""
        return self._prompt("prefix")

    def _prompt(self, placement: str) -> Tensor | None:
        if placement not in self.memories:
            return None
        rows = getattr(self.memories[placement], placement)()
        return rows if self.context is None else rows + self.context()

    def columns(self, target: Tensor) -> Tensor:
        """Targets as the head's output numbers them: item ids [m] become columns of the catalogue."""
        if self.spec.kind != "items":
            return target
        columns = self.column_of[target]
        if bool((columns < 0).any()):
            item = int(target[columns < 0][0])
            raise ValueError(f"targets of task {self.spec.name!r} must be in its catalogue, got item {item}")
        return columns

    def memory_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the head."""
        head = {id(p) for p in self.head.parameters()}
        return [p for p in self.parameters() if id(p) not in head]

    @property
    def every_state(self) -> bool:
        """Whether this task reads the states of all rows of a history, not the newest ones alone."""
        return self.repeats is not None or any(memory.every_state for memory in self.memories.values())

    @property
    def lower_states(self) -> bool:
        """Whether this task reads the states of all rows of a history below the last layer."""
        return any(memory.lower_states for memory in self.memories.values())

    def reread(self, encoded: Encoded) -> Encoded:
        """The histories as this task's readouts see them."""
        for memory in self.memories.values():
            encoded = memory.reread(encoded) or encoded
        return encoded

    def features(self, encoded: Encoded) -> Tensor:
        """[B, F], what the head reads."""
        return self._features(self.reread(encoded))

    def standardised(self, encoded: Encoded) -> Tensor:
        """[B, F], the features as the head takes them."""
        return self._standardised(self.reread(encoded))

    def _standardised(self, encoded: Encoded) -> Tensor:
        return (self._features(encoded) - self.shift) * self.scale

    def _features(self, encoded: Encoded) -> Tensor:
        parts = [memory.features(encoded) for memory in self.memories.values() if memory.num_features]
        return torch.cat(parts, dim=1)

    def forward(self, encoded: Encoded, table: Tensor) -> Tensor:
        """Histories read for this task, and the item table [V + 1, D] -> output [B, C], or [B] for one number.

        Where targets are new items (`spec.repeats` is False), what the history holds already scores SEEN_SCORE.
        """
        if self.spec.kind == "items":
            return self.item_scores(self.queries(encoded), encoded, table)
        output = self.head(self._head_features(self.reread(encoded)))
        if self.spec.kind == "classes":
            return output
        return output[:, 0] * self.head.unit[1] + self.head.unit[0]

    def _head_features(self, encoded: Encoded) -> Tensor:
        features = self._standardised(encoded)
        return torch.where(self.fixed, self.dropout(features), features)

    def queries(self, encoded: Encoded) -> Tensor:
        """[B, D], what the items of an items task are scored against."""
        encoded = self.reread(encoded)
        return self.head.queries(self._head_features(encoded), encoded.newest)

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
        if self.repeats is not None:
            for piece in encoded.pieces:
                columns = self._columns_among(piece.items, first, len(catalogue))
                scores = self.repeats(scores, piece.states[-1], piece.users(), columns)
            return scores
        columns = self._columns_among(encoded.items, first, len(catalogue))
        listed = columns >= 0
        return scores.index_put((encoded.users()[listed], columns[listed]), scores.new_tensor(SEEN_SCORE))

    def _columns_among(self, items: Tensor, first: int, count: int) -> Tensor:
        """items [T] -> their columns counted from `first`, -1 for those that are not among these `count`."""
        columns = self.column_of[items] - first
        return columns.masked_fill((columns < 0) | (columns >= count), -1)

    @torch.no_grad()
    def fit_head(self, features: Tensor, target: Tensor, target_row: Tensor) -> None:
        """Start the head at the training data's own base rates, on standardised features.

        features [n, F] of some training histories, target [m], target_row [m].
        """
        deviation, mean = torch.std_mean(features.double(), dim=0, correction=0)
        self.shift.copy_(torch.where(self.fixed, mean, 0.0))
        self.scale.copy_(torch.where(self.fixed, 1.0 / deviation.clamp_min(1e-3), 1.0))
        if self.spec.kind == "items":
            counts = torch.bincount(target, minlength=self.head.bias.numel()).double() + 1.0
            self.head.bias.copy_((counts / counts.mean()).log())
            return
        if self.spec.kind == "regression":
            deviation, mean = torch.std_mean(target.double(), correction=0)
            self.head.unit.copy_(torch.stack([mean, deviation.clamp_min(1e-12)]))
            return
        classes = max(self.head.linear.out_features, 2)
        counts = torch.bincount(target.long(), minlength=classes).double() + 1.0
        prior = counts.log() - counts.log().mean()
        self.head.linear.bias.copy_(prior if self.spec.kind == "classes" else (prior[1] - prior[0])[None])

    def close(self) -> None:
        """Fold the contextual prompt into the stored one and freeze everything, for good."""
        if self.context is not None:
            with torch.no_grad():
                rows = self.context()
                for placement in ("tail", "prefix"):
                    if placement in self.memories:
                        self.memories[placement].rows += rows
            self.context = None
        freeze(self)
        self.closed = True
