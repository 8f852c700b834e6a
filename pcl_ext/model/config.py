"""Typed settings of the backbone and of what a task stores. Plain values, so they go into JSON as they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

KINDS = ("transformer", "nextitnet")
POSITIONS = ("learned_from_end", "rotary")
PLACEMENTS = ("none", "tail", "prefix", "both", "layers")
READOUTS = ("last", "mean", "item_memory", "pooled", "earlier")
CONTEXTS = ("none", "texts", "prompts")


def is_whole(value: object, low: int) -> bool:
    """Whether it is a whole number from `low` up, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= low


def plain(value: Real) -> int | float:
    """A number of NumPy as one of Python, which JSON takes."""
    return value if isinstance(value, int) else float(value)


def check_whole(config: object, **least: int) -> None:
    """ValueError where a setting is no whole number from its least value up; one of NumPy becomes an int."""
    for name, low in least.items():
        if not is_whole(value := getattr(config, name), low):
            raise ValueError(f"{name} must be a whole number from {low} up, got {value!r}")
        object.__setattr__(config, name, int(value))


def _check_one_of(owner: object, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        if getattr(owner, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(owner, name)!r}")


def _check_share(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
        object.__setattr__(owner, name, plain(value))


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of the shared encoder.

    Args:
        num_items: V, item ids are 1..V
        dim: D, width of the embeddings and layers, a multiple of num_heads
        num_heads: attention heads of a layer
        num_layers: layers; of a nextitnet, residual blocks of two causal convolutions
        ffn_dim: width of the feed-forward layers; null is 4 D
        max_len: how many of the newest events of a history count
        dropout: on embeddings and residual branches, while pretraining only
        kind: of the layers: transformer, or nextitnet (causal dilated convolutions, which take neither num_heads nor
            ffn_dim nor positions into account)
        positions: of a transformer: learned_from_end (a learned row for each distance to the newest event), or rotary
            (queries and keys turned by their place, which new events do not change: what a UserState needs)
    """

    num_items: int
    dim: int = 64
    num_heads: int = 2
    num_layers: int = 2
    ffn_dim: int | None = None
    max_len: int = 200
    dropout: float = 0.2
    kind: str = "transformer"
    positions: str = "learned_from_end"

    def __post_init__(self):
        _check_one_of(self, kind=KINDS, positions=POSITIONS)
        check_whole(self, num_items=1, dim=1, num_heads=1, num_layers=1, max_len=1)
        _check_share(self, "dropout")
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {self.dim} and {self.num_heads}")
        if self.ffn_dim is None:
            object.__setattr__(self, "ffn_dim", 4 * self.dim)
        check_whole(self, ffn_dim=1)
        if self.rotary and self.dim // self.num_heads % 2:
            width = self.dim // self.num_heads
            raise ValueError(
                f"rotary positions need an even dim / num_heads, got {self.dim} / {self.num_heads} = {width}"
            )

    @property
    def rotary(self) -> bool:
        """Whether attention turns queries and keys by their place."""
        return self.kind == "transformer" and self.positions == "rotary"

    @property
    def counts_from_end(self) -> bool:
        """Whether a row depends on how many events come after it."""
        return self.kind == "transformer" and self.positions == "learned_from_end"

    def to_json(self) -> dict[str, Any]:
        """Its fields; those that came later are left out at their defaults, so that older runs keep their hashes."""
        later = {"kind": "transformer", "positions": "learned_from_end"}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True)
class MemoryConfig:
    """What one task stores.

    Args:
        placement: where its prompt goes: tail (added to the last embeddings, Eq. 1), prefix (in front of the history),
            both, layers (in front of it in every layer: keys and values of its own, prefix tuning) or none
        prompt_len: t, rows of each prompt
        readout: what the head reads: any of last (newest state), mean (means of every layer's states), item_memory
            (a table of the task's own with item_width numbers an item, pooled over the history), pooled (learned
            pooling of the first states), earlier (attention over the readouts of closed tasks, asked by the user's
            state; needs placement none); null is last for an items task that is tied, last and item_memory for one
            with a table of its own, last, mean and item_memory for labels
        item_width: width of the item memory; null is 16 for labels, or twice the number of classes if that is more, and
            D for items
        item_rows: rows of the item memory at most; with more items than that, an item is the sum of two hashed rows
        whole_history: item memory reads all events of a history, not only the newest max_len that the backbone reads
        item_dropout: share of the events that item memory and pooled leave out at random while the task learns
        pooled_units: width of pooled
        earlier_units: width of earlier
        low_rank: rank of the task's change to the top layer's weights; 0 is none; not with a prefix
        members: labels only, so many readouts and heads learn side by side from starts of their own; closing averages
            them into one
        contextual: what the task takes from others: none, texts (their descriptions) or prompts (their stored rows)
        tied: items only, score against the frozen item table; null ties where every item of the catalogue was
            trained in pretraining, and gives the task an output table of its own elsewhere
        dropout: on what the head reads of the backbone's states, while the task learns; null is 0.8, or 0.5 for a
            label that has no item memory beside them
    """

    placement: str = "tail"
    prompt_len: int = 5  # as good as 20 on online-retail, better where users are few, and less to compute
    readout: tuple[str, ...] | None = None
    item_width: int | None = None
    item_rows: int = 16_384
    whole_history: bool = True  # what heavy users spend and order says the whole of it; see docs/tried.md
    item_dropout: float = 0.5
    pooled_units: int = 32
    earlier_units: int = 16
    low_rank: int = 0
    members: int = 1
    contextual: str = "none"
    tied: bool | None = None
    dropout: float | None = None

    def __post_init__(self):
        check_whole(self, prompt_len=0, item_rows=2, pooled_units=1, earlier_units=1, low_rank=0, members=1)
        _check_share(self, "item_dropout", *(["dropout"] if self.dropout is not None else []))
        if self.item_width is not None:
            check_whole(self, item_width=1)
        if not isinstance(self.whole_history, bool):
            raise ValueError(f"whole_history must be true or false, got {self.whole_history!r}")
        if self.tied is not None and not isinstance(self.tied, bool):
            raise ValueError(f"tied must be true, false or null, got {self.tied!r}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        if self.contextual not in CONTEXTS:
            raise ValueError(f"contextual must be one of {', '.join(CONTEXTS)}, got {self.contextual!r}")
        if self.contextual != "none" and self.placement in ("none", "layers"):
            raise ValueError(
                f"contextual {self.contextual!r} needs a tail or a prefix to act on, got placement {self.placement!r}"
            )
        if self.contextual != "none" and not self.prompt_len:
            raise ValueError(f"contextual {self.contextual!r} needs a prompt to act on, got prompt_len 0")
        if self.low_rank and self.placement in ("prefix", "both", "layers"):
            raise ValueError(f"low_rank reads histories without a prefix, got placement {self.placement!r}")
        if self.readout is not None:
            names = self.readout if isinstance(self.readout, (tuple, list)) else (self.readout,)
            object.__setattr__(self, "readout", tuple(names))
            unknown = [name for name in self.readout if name not in READOUTS]
            if unknown or not self.readout or len(set(self.readout)) != len(self.readout):
                raise ValueError(f"readout must name one or more of {', '.join(READOUTS)} once, got {self.readout}")
            if "earlier" in self.readout and self.placement != "none":
                raise ValueError(f"readout 'earlier' reads histories without prompts, got placement {self.placement!r}")
