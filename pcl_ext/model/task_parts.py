"""What a task is made of: its prompts, what its head reads, and the head. Items tasks and labels have a class each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcl_ext.model.backbone import Backbone
from pcl_ext.model.catalogue import Catalogue
from pcl_ext.model.config import BackboneConfig, MemoryConfig
from pcl_ext.model.heads import ItemsHead, LabelHead, TiedItemsHead
from pcl_ext.model.members import folded_width
from pcl_ext.model.memories import (
    EarlierReadouts,
    ItemMemory,
    LastState,
    LayerPrompt,
    LearnedPool,
    LowRankPrompts,
    MeanStates,
    Memory,
    PrefixPrompt,
    TailPrompt,
)
from pcl_ext.task import TaskSpec

if TYPE_CHECKING:
    from pcl_ext.model.task_module import Task

COLD_WIDTH = 128  # a regression of this rank ranks nearly as the whole one does
DROPOUT, PLAIN_DROPOUT = 0.8, 0.5  # where all that a label's head reads is states, 0.8 leaves it a greater loss


def prompts(config: MemoryConfig, backbone: Backbone) -> dict[str, Memory]:
    """The memories, by name, that change the states of a history; the head reads nothing of theirs."""
    made, dim = {}, backbone.config.dim
    if config.placement in ("tail", "both"):
        made["tail"] = TailPrompt(config.prompt_len, dim)
    if config.placement in ("prefix", "both"):
        made["prefix"] = PrefixPrompt(config.prompt_len, dim)
    if config.placement == "layers":
        made["layers"] = LayerPrompt(config.prompt_len, backbone.config)
    if config.low_rank:
        made["low_rank"] = LowRankPrompts(backbone, config.low_rank)
    return made


class Parts:
    """What a task's head reads. A class for each kind of task says which memories these are, how wide, and what head.

    readouts      their names, in the head's order
    item_width    features of an item memory
    pooled_units  features of a learned pooling
    dropout       on the features that are states of the backbone, while the task learns
    """

    readouts: tuple[str, ...]
    item_width: int
    dropout: float
    tied = cold = False  # an items task may be
    members = 1  # a label task may have more

    def __init__(self, config: MemoryConfig, shape: BackboneConfig):
        self.config, self.shape, self.pooled_units = config, shape, config.pooled_units

    def readout(self, name: str, earlier: Sequence[Task] = ()) -> Memory:
        """A new memory of this name."""
        config, shape = self.config, self.shape
        if name == "last":
            return LastState(shape)
        if name == "mean":
            return MeanStates(shape)
        if name == "pooled":
            return LearnedPool(shape, self.pooled_units, config.item_dropout)
        if name == "earlier":
            return EarlierReadouts(shape, earlier, config.earlier_units)
        sizes = (shape.num_items, self.item_width, config.item_dropout, config.item_rows)
        return ItemMemory(*sizes, whole=config.whole_history)


class ItemsParts(Parts):
    """An items task.

    trained  [C] bool, on the CPU: which items of the catalogue the backbone has trained
    tied     whether items are scored against the frozen table
    cold     whether an item memory has to do what the backbone cannot: most of the catalogue was never trained
    """

    def __init__(self, ranked: Catalogue, config: MemoryConfig, backbone: Backbone):
        super().__init__(config, backbone.config)
        self.items, self.backbone = ranked.items, backbone
        self.trained = backbone.trained_items[self.items].cpu()
        self.tied = bool(self.trained.all()) if config.tied is None else config.tied
        self.readouts = config.readout or (("last",) if self.tied else ("last", "item_memory"))
        share = float(self.trained.double().mean())
        self.cold = not self.tied and "item_memory" in self.readouts and share < 0.5
        self.item_width = config.item_width or (COLD_WIDTH if self.cold else self.shape.dim)
        self.dropout = DROPOUT if config.dropout is None else config.dropout

    def head(self, fixed: Tensor) -> TiedItemsHead | ItemsHead:
        """A new head; fixed [F] bool: which of the features it reads are standardised."""
        if self.tied:
            return TiedItemsHead(len(fixed), self.shape.dim, len(self.items))
        table, trained = self.backbone.table.detach()[self.items].cpu(), self.trained  # drawn there, as all weights are
        if self.cold:
            table, trained = table.new_zeros(len(table), self.item_width), torch.zeros_like(trained)
        return ItemsHead(table, trained, ~fixed)


class LabelParts(Parts):
    """A binary, classes or regression task.

    closed   widths of a closed task, whose members `members.fold` has made one
    members  how many readouts and heads learn side by side
    """

    def __init__(self, spec: TaskSpec, config: MemoryConfig, shape: BackboneConfig, *, closed: bool):
        super().__init__(config, shape)
        self.outputs, self.members = spec.num_outputs(shape.num_items), 1 if closed else config.members
        self.readouts = config.readout or ("last", "mean", "item_memory")
        self.item_width = config.item_width or max(16, 2 * self.outputs)  # fewer could not tell many classes apart
        chosen = DROPOUT if "item_memory" in self.readouts else PLAIN_DROPOUT
        self.dropout = chosen if config.dropout is None else config.dropout
        if closed:
            self.item_width = folded_width("item_memory", self.item_width, config.members, self.outputs)
            self.pooled_units = folded_width("pooled", self.pooled_units, config.members, self.outputs)

    def head(self, fixed: Tensor) -> LabelHead:
        """A new head; fixed [F] bool: which of the features it reads are standardised."""
        return LabelHead(len(fixed), self.outputs)
