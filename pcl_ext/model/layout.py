"""Where the rows of a pass lie: histories, and the rows computed before that they may look back at."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_ext import ops


@dataclass(frozen=True)
class LayerPrefix:
    """Rows computed before that histories may look back at, as the keys and values of every layer.

    keys, values  num_layers tensors [M, H, d]; of convolutions [M, D], what their first and second one read
    offsets       [R + 1] int64, first row of each prefix
    index         [B] int64, the prefix of each history, -1 none; may be None when R is 1 or B
    """

    keys: list[Tensor]
    values: list[Tensor]
    offsets: Tensor
    index: Tensor | None = None


@dataclass(frozen=True)
class LookBack:
    """Rows [m, n] that m rows see at n distances.

    own     [m, n] int64, among the rows of the pass; T where there is none
    before  [m, n] int64, among the rows of the prefix; -1 where there is none; None without a prefix
    """

    own: Tensor
    before: Tensor | None

    def take(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x [T, D], before [M, D] of the prefix -> [m, n D], 0 where nothing is seen."""
        taken = F.embedding(self.own.flatten(), torch.cat([x, x.new_zeros(1, x.shape[1])]))
        if before is not None and len(before):
            rows = self.before.flatten()
            shared = F.embedding(rows.clamp_min(0), before).to(taken.dtype)
            taken = torch.where((rows >= 0)[:, None], shared, taken)
        return taken.view(len(self.own), self.own.shape[1] * x.shape[1])


@dataclass(frozen=True)
class Layout:
    """Histories of one pass, shared by all layers.

    offsets         [B + 1] int64
    total           packed rows T
    plan            of the attention over them and their prefixes
    on_host         [B] int64, their lengths on the CPU; None: they are read from the offsets where they are needed
    prefix_offsets  [R + 1] int64, None without a prefix
    prefix_index    [B] int64, None without a prefix
    """

    offsets: Tensor
    total: int
    plan: ops.AttentionPlan
    on_host: Tensor | None = None
    prefix_offsets: Tensor | None = None
    prefix_index: Tensor | None = None

    @classmethod
    def of(
        cls,
        offsets: Tensor,
        total: int,
        plan: ops.AttentionPlan | None = None,
        prefix: LayerPrefix | None = None,
        on_host: Tensor | None = None,
    ) -> Layout:
        """The layout of a pass over `total` rows; the plan is made where there is none."""
        shared = (prefix.offsets, prefix.index) if prefix else ()
        plan = plan or ops.attention_plan(offsets, *shared)
        return cls(offsets, total, plan, on_host, *((prefix.offsets, plan.prefix_index) if prefix else ()))

    _angles: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def newest(self) -> Tensor:
        """[m] int64, the newest row of each history that is not empty."""
        return newest_rows(self.offsets, self.on_host)

    @cached_property
    def first(self) -> Tensor:
        """[B] int64, the place of each history's first row: it follows its prefix."""
        if self.prefix_offsets is None:
            return torch.zeros_like(self.offsets[1:])
        return torch.cat([self.prefix_offsets.diff(), self.offsets.new_zeros(1)])[self.prefix_index]

    @cached_property
    def place(self) -> Tensor:
        """[T] int64, how many rows come before each row, its prefix included."""
        rows = torch.arange(self.total, device=self.offsets.device)
        return rows + self._of_rows(self.first - self.offsets[:-1])

    def _of_rows(self, values: Tensor) -> Tensor:
        """A value of each history [B] for each of its rows [T]."""
        return values.repeat_interleave(self.offsets.diff(), output_size=self.total)

    def turn(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [T, H, d] turned by the places of its rows (rotary positions: Su et al., 2021, eq. 34).

        Coordinates j and j + d/2 are turned together by place / 10000^(2j / d). With rows [m], x [m, H, d] is of these.
        """
        half, dtype = x.shape[2] // 2, torch.float64 if x.dtype == torch.float64 else torch.float32
        if (half, dtype) not in self._angles:
            speed = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
            angle = self.place.double()[:, None, None] * speed
            self._angles[half, dtype] = (angle.cos().to(dtype), angle.sin().to(dtype))
        cos, sin = (t if rows is None else t.index_select(0, rows) for t in self._angles[half, dtype])
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def look_back(self, count: int, step: int, rows: Tensor | None = None) -> LookBack:
        """Where the `count` rows lie that each row (or each of rows [m]) sees, `step` apart, itself the last one."""
        here = torch.arange(self.total, device=self.offsets.device) if rows is None else rows
        back = torch.arange(count - 1, -1, -1, device=here.device) * step
        place, begin = self.place[here, None] - back, self._of_rows(self.first)[here, None]
        own = torch.where(place >= begin, here[:, None] - back, self.total)
        if self.prefix_offsets is None:
            return LookBack(own, None)
        starts = self._of_rows(self.prefix_offsets[self.prefix_index.clamp_min(0)])[here, None]
        return LookBack(own, torch.where((place >= 0) & (place < begin), starts + place, -1))

    def prefixed(self, before: tuple[Tensor, Tensor] | None) -> tuple:
        """The last arguments of an attention: keys and values of a layer's prefix, and who sees which; or nothing."""
        return () if before is None else (*before, self.prefix_offsets, self.prefix_index)


def filled_histories(offsets: Tensor, on_host: Tensor | None = None) -> Tensor:
    """offsets [B + 1] -> [m] int64, which histories are not empty.

    on_host: their lengths [B] on the CPU, which say how many these are; without them a GPU is waited for.
    """
    filled = offsets.diff() > 0
    if on_host is None:
        return filled.nonzero()[:, 0]
    return torch.nonzero_static(filled, size=int(torch.count_nonzero(on_host)))[:, 0]


def newest_rows(offsets: Tensor, on_host: Tensor | None = None) -> Tensor:
    """offsets [B + 1] -> [m] int64, the newest row of each history that is not empty; on_host as above."""
    if on_host is not None and not torch.compiler.is_compiling() and all(on_host.tolist()):
        return offsets[1:] - 1  # as it mostly is: one step in place of five
    return offsets[1:].index_select(0, filled_histories(offsets, on_host)) - 1


def to_offsets(lengths: Tensor) -> Tensor:
    """lengths [B] -> offsets [B + 1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
