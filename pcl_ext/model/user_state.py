"""UserState: what is known of histories, kept so that new events cost what they are and not what came before."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pcl_ext.batch import Older, PackedBatch
from pcl_ext.model.backbone import Backbone
from pcl_ext.model.encoded import Encoded, Piece, Trunk, pool
from pcl_ext.model.layout import LayerPrefix, to_offsets

ROOM = 32  # rows that a history is given ahead
SPARE = 16  # with fewer rows left than these a history is given more, where all are moved anyway


class UserState:
    """Histories of B users with the keys and values of every layer, which take new events in O(new).

    Needs a backbone that does not count positions from the end: rotary ones, or convolutions. What is held is without
    prompts and therefore the same for all tasks; a tail prompt of P rows is read in O(P). Reading gives what a full
    pass over `batch()` gives, up to rounding.

    The window: a history that would grow past max_len is started again from its newest `keep` events, one full pass
    over these; so the backbone reads a long history through a window of keep to max_len events. keep is 3/4 of max_len
    unless given. Of what lies before the window the ids are held, 8 bytes each: item memories read them, and an items
    task ranks them last.

    Any number of threads may read it at once; while one extends it, nobody else reads or extends it.
    """

    def __init__(self, backbone: Backbone, users: int, *, every_state: bool = False, keep: int | None = None):
        """Empty histories. every_state: hold the states of all rows too, for tasks that read them (means, votes)."""
        config = backbone.config
        if config.counts_from_end:
            raise ValueError(
                "UserState needs positions that new events do not change, got positions='learned_from_end'; pretrain "
                "a backbone with positions='rotary' or kind='nextitnet'"
            )
        if any(True for _ in backbone.parameters()):
            raise ValueError("UserState needs a frozen backbone: call freeze_backbone() first")
        keep = max(1, config.max_len * 3 // 4) if keep is None else keep
        if not 1 <= keep <= config.max_len:
            raise ValueError(f"keep must be in 1..max_len = {config.max_len}, got {keep}")
        self.backbone, self.keep = backbone, keep
        table = backbone.table
        layers, shape = range(config.num_layers), (0, config.dim)
        rows = shape if config.kind == "nextitnet" else (0, config.num_heads, config.dim // config.num_heads)
        self.starts, self.lengths = (torch.zeros(users + n, dtype=torch.int64, device=table.device) for n in (1, 0))
        self.items, self.older_items, self.older_offsets = (self.lengths.new_zeros(n) for n in (0, 0, users + 1))
        self.keys, self.values = ([table.new_zeros(rows) for _ in layers] for _ in range(2))
        self.newest = table.new_zeros(users, config.dim)
        depths = range(config.num_layers + 1) if every_state else ()
        self.states = [table.new_zeros(shape) for _ in depths]
        self.totals = [table.new_zeros(users, config.dim) for _ in depths]

    @classmethod
    def of(
        cls, backbone: Backbone, batch: PackedBatch, *, every_state: bool = False, keep: int | None = None
    ) -> UserState:
        """The state after the events of a batch."""
        state = cls(backbone, len(batch), every_state=every_state, keep=keep)
        state.extend(batch)
        return state

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def every_state(self) -> bool:
        """Whether states of all rows are held."""
        return bool(self.states)

    def batch(self) -> PackedBatch:
        """The histories as they are held: the window, and before it what is older."""
        items, offsets = self._items()
        older = self.older
        batch = PackedBatch.from_packed(items.cpu(), offsets.cpu(), older=None if older is None else older.to("cpu"))
        return batch.to(items.device)

    @property
    def older(self) -> Older | None:
        """What the histories held before the window, where any did."""
        if not len(self.older_items):
            return None
        return Older(self.older_items, self.older_offsets, self.older_offsets.diff().cpu())

    @torch.no_grad()
    def extend(self, batch: PackedBatch) -> None:
        """Take the new events of every user [B], oldest first; a user may have none. What is held stays as it was where
        the batch is refused or the pass over it fails."""
        if not isinstance(batch, PackedBatch):
            raise TypeError(f"batch must be a PackedBatch, say of PackedBatch.from_lists, got {type(batch).__name__}")
        if len(batch) != len(self):
            raise ValueError(f"batch must hold a history of new events for each of {len(self)} users, got {len(batch)}")
        config, items, offsets = self.backbone.config, batch.items.long(), batch.offsets
        low, high = (int(x) for x in batch.whole[0].aminmax()) if len(items) else (1, 1)
        if not 1 <= low <= high <= config.num_items:
            raise ValueError(f"items must be in 1..{config.num_items}, got {low}..{high}")
        unread = None
        if batch.older is not None:
            (items, offsets), unread = self._older_among(items, offsets, batch.older)
        over, older = self.lengths + offsets.diff() > config.max_len, (self.older_items, self.older_offsets)
        if unread is not None or bool(over.any()):
            (items, offsets), older = self._begin_again(over, items, offsets, unread)
        self._append(items, offsets, torch.where(over, 0, self.lengths))
        self.older_items, self.older_offsets = older

    def _older_among(
        self, items: Tensor, offsets: Tensor, older: Older
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """New events after the older ones of histories that hold something already, which these follow; and those of
        the others, as a part of `_join`."""
        first, counts = older.offsets[:-1], older.offsets.diff()
        among = torch.where(self.lengths > 0, counts, 0)
        joined = _join([(older.items.long(), first, among), (items, offsets[:-1], offsets.diff())])
        return joined, (older.items, first, counts - among)

    def _begin_again(
        self, over: Tensor, items: Tensor, offsets: Tensor, unread: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Where the histories that are `over` [B] bool the window are emptied first: items and offsets to append, new
        events after the held ones that such a history begins with; and of all that then lies before the window.

        unread  what histories that hold nothing have before their new events, a part of `_join`
        """
        new, end = offsets.diff(), self.starts[:-1] + self.lengths
        read = torch.where(over, new.clamp_max(self.keep), new)
        held = torch.where(over, torch.minimum(self.keep - read, self.lengths), 0)
        gone = torch.where(over, self.lengths - held, 0)
        parts = [(self.older_items, self.older_offsets[:-1], self.older_offsets.diff())]
        parts.append((self.items, self.starts[:-1], gone))
        if unread is not None:
            parts.append(unread)
        parts.append((items, offsets[:-1], new - read))
        append = _join([(self.items, end - held, held), (items, offsets[1:] - read, read)])
        return append, _join(parts)

    def _append(self, items: Tensor, offsets: Tensor, lengths: Tensor) -> None:
        """After the first `lengths` [B] rows of each history. Users without new events cost nothing: the pass is over
        the others [F] alone."""
        new = offsets.diff()
        self._make_room(lengths + new)
        filled = (new > 0).nonzero()[:, 0]
        offsets, held = to_offsets(new[filled]), self._prefix(lengths, filled)
        rows = self.backbone.embed(items, offsets)
        read = "every" if self.every_state else "newest"
        states, kept = self.backbone.run(rows, offsets, prefix=held, read=read)
        place = _places(self.starts[:-1] + lengths, new)
        self.items[place] = items
        stored = [*self.keys, *self.values, *self.states]
        for target, fresh in zip(stored, [*kept.keys, *kept.values, *states]):
            target[place] = fresh.to(target.dtype)
        top = states[-1].index_select(0, offsets[1:] - 1) if self.every_state else states[-1]
        self.newest[filled] = top.to(self.newest.dtype)
        for total, state in zip(self.totals, states):
            before = total[filled].masked_fill((lengths[filled] == 0)[:, None], 0)
            total[filled] = before + pool(state, torch.arange(len(state), device=state.device), offsets)
        self.lengths = lengths + new

    def _make_room(self, lengths: Tensor) -> None:
        """Give users more rows where theirs do not hold so many. All are moved then, seldom: those who would be next
        are given more too."""
        room = self.starts.diff()
        if not bool((lengths > room).any()):
            return
        more = (lengths + torch.clamp_min(lengths // 4, ROOM)).clamp_max(self.backbone.config.max_len)
        room = torch.where(room - lengths < SPARE, more, room)
        self._move(to_offsets(room), torch.arange(len(self), device=room.device))

    def _move(self, starts: Tensor, users: Tensor) -> None:
        """Lay out anew: the rows of some users [b] at starts [b + 1]."""
        lengths = self.lengths[users]
        old, new = _places(self.starts[users], lengths), _places(starts[:-1], lengths)

        def moved(rows: Tensor) -> Tensor:
            fresh = rows.new_zeros(int(starts[-1]), *rows.shape[1:])
            fresh[new] = rows[old]
            return fresh

        self.items = moved(self.items)
        for rows in (self.keys, self.values, self.states):
            rows[:] = [moved(row) for row in rows]
        self.starts, self.lengths = starts, lengths

    def _prefix(self, lengths: Tensor, users: Tensor) -> LayerPrefix:
        """The first `lengths` [B] rows of each of the users [b] as the prefix of what comes after; nobody sees the
        others."""
        first = self.starts[users]
        ends = torch.stack([first, first + lengths[users]], 1).flatten()
        index = 2 * torch.arange(len(users), device=lengths.device) + 1
        return LayerPrefix(self.keys, self.values, torch.cat([self.starts[:1], ends, self.starts[-1:]]), index)

    def _items(self) -> tuple[Tensor, Tensor]:
        return self.items[_places(self.starts[:-1], self.lengths)], to_offsets(self.lengths)

    def read(self) -> Encoded:
        """The histories as a task without prompts reads them."""
        items, offsets = self._items()
        pieces = self._pieces(items, offsets, self.lengths, None)
        return Encoded(items, offsets, self.newest, pieces, None, self.older)

    def trunk(self, length: int, *, every_state: bool) -> Trunk:
        """The histories up to their newest `length` rows, as `Trunk.of` gives them, at the cost of these rows."""
        items, offsets = self._items()
        tails = self.lengths.clamp_max(length)
        before = self.lengths - tails
        rows = _places(self.starts[:-1] + before, tails)
        pieces = self._pieces(items, offsets, before, rows) if every_state else [None]
        tail_offsets = to_offsets(tails)
        return Trunk(
            self.backbone,
            items,
            offsets,
            self._prefix(before, torch.arange(len(self), device=before.device)),
            pieces[0],
            self.items[rows],
            tail_offsets,
            None,
            self.older,
        )

    def _pieces(self, items: Tensor, offsets: Tensor, lengths: Tensor, left_out: Tensor | None) -> list[Piece]:
        """The first `lengths` rows of each history with their states; left_out: the rows [N] after these."""
        if not self.every_state:
            return []
        place = _places(self.starts[:-1], lengths)
        totals = dict(enumerate(self.totals))
        if left_out is not None:
            tails = to_offsets(offsets.diff() - lengths)
            totals = {depth: total - pool(self.states[depth], left_out, tails) for depth, total in totals.items()}
            items = self.items[place]
        return [Piece(_Rows(self.states, place), items, to_offsets(lengths), None, totals)]

    def select(self, users: Tensor) -> UserState:
        """The state of some of the users [b] int64, a copy."""
        part = UserState(self.backbone, 0, every_state=self.every_state, keep=self.keep)
        for name in ("items", "keys", "values", "states", "starts", "lengths"):
            value = getattr(self, name)
            setattr(part, name, list(value) if isinstance(value, list) else value)
        part._move(to_offsets(self.starts.diff()[users]), users)
        part.newest, part.totals = self.newest[users], [total[users] for total in self.totals]
        older = (self.older_items, self.older_offsets[users], self.older_offsets.diff()[users])
        part.older_items, part.older_offsets = _join([older])
        return part

    def tensors(self) -> dict[str, Tensor]:
        """Everything as plain tensors, for `store.save_tensors`; `backbone` is a hash of the backbone's own."""
        parts = {"keys": self.keys, "values": self.values, "states": self.states, "totals": self.totals}
        named = {f"{name}.{depth}": t for name, rows in parts.items() for depth, t in enumerate(rows)}
        names = ("items", "starts", "lengths", "newest", "older_items", "older_offsets")
        single = {name: getattr(self, name) for name in names}
        return named | single | {"keep": torch.tensor(self.keep, device="cpu"), "backbone": _hash(self.backbone)}

    @classmethod
    def from_tensors(cls, backbone: Backbone, tensors: Mapping[str, Tensor]) -> UserState:
        """What `tensors` gave. ValueError where a tensor is missing, or they are of another backbone."""
        wanted = cls(backbone, 0, every_state="states.0" in tensors).tensors()
        if missing := sorted(wanted.keys() - tensors.keys()):
            raise ValueError(f"tensors must hold {missing[0]!r}, they hold {', '.join(sorted(tensors))}")
        if not torch.equal(tensors["backbone"].cpu(), wanted["backbone"]):
            raise ValueError("tensors are the state of another backbone; make it again from the users' histories")
        state = cls(backbone, 0, every_state="states.0" in tensors, keep=int(tensors["keep"]))
        for name in wanted.keys() - {"keep", "backbone"}:
            part, _, depth = name.partition(".")
            tensor = tensors[name].to(backbone.table.device)
            if depth:
                getattr(state, part)[int(depth)] = tensor
            else:
                setattr(state, part, tensor)
        return state


class _Rows(Sequence):
    """States of some rows, layer by layer, gathered only where they are asked for."""

    def __init__(self, stored: list[Tensor], place: Tensor):
        self.stored, self.place = stored, place

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, depth: int | slice) -> Tensor | list[Tensor]:
        if isinstance(depth, slice):
            return [rows.index_select(0, self.place) for rows in self.stored[depth]]
        return self.stored[depth].index_select(0, self.place)


def _join(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of each part: rows, and where in them and how many of these each history has, [B] int64. -> all of them, one
    part after the other in each history, and their offsets [B + 1]."""
    offsets = to_offsets(sum(lengths for _, _, lengths in parts))
    joined, start = parts[0][0].new_empty(int(offsets[-1])), offsets[:-1]
    for rows, first, lengths in parts:
        joined[_places(start, lengths)] = rows[_places(first, lengths)].to(joined.dtype)
        start = start + lengths
    return joined, offsets


def _places(first: Tensor, lengths: Tensor) -> Tensor:
    """Rows first[b] .. first[b] + lengths[b] - 1 of every b, in order."""
    offsets = to_offsets(lengths)
    total = int(offsets[-1])
    return torch.arange(total, device=first.device) + (first - offsets[:-1]).repeat_interleave(
        lengths, output_size=total
    )


def _hash(backbone: Backbone) -> Tensor:
    """[32] uint8, sha256 of a backbone's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
