"""What earlier tasks have to say about a user: attention over their frozen readouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.encoded import Encoded
from pcl_ext.model.memories.base import Memory

if TYPE_CHECKING:
    from pcl_ext.model.task_module import Task


class EarlierReadouts(Memory):
    """Contextual attention by user: the user's newest state asks, the answers of closed tasks are the values.

    Each closed task's features (what its own head reads of this user, its standardisation included) are projected to
    `units` numbers; the attention over tasks depends on the user, so it cannot be folded into a constant. The earlier
    tasks are closed, so nothing of this one moves later; they are read where they lie, not copied.

    sources  closed tasks that put no prompt of their own into the history
    """

    standardise = False

    def __init__(self, config: BackboneConfig, sources: Sequence[Task], units: int):
        super().__init__()
        self._sources = tuple(sources)  # a tuple: they are no part of what the task stores
        self.every_state = any(source.every_state for source in sources)
        self.num_features = units
        if not sources:  # nothing to read, so nothing to learn
            return
        self.query = nn.Linear(config.dim, units)
        self.keys = nn.Parameter(torch.randn(len(sources), units) * units**-0.5)
        self.values = nn.ModuleList(nn.Linear(len(source.fixed), units, bias=False) for source in sources)

    def features(self, encoded: Encoded) -> Tensor:
        """[B, units]; 0 where there is no earlier task."""
        if not self._sources:
            return encoded.newest.new_zeros(len(encoded.newest), self.num_features)
        with torch.no_grad():
            said = [source.standardised(encoded) for source in self._sources]
        values = torch.stack([project(said_j) for project, said_j in zip(self.values, said)], dim=1)  # [B, k, units]
        scores = (self.keys * self.query(encoded.newest)[:, None]).sum(-1) / self.num_features**0.5
        return (scores.softmax(1)[:, :, None] * values).sum(1)
