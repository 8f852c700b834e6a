"""What one task stores: small modules under one interface. A new kind of memory is a new class here, nothing else."""

from __future__ import annotations

import hashlib
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_ext.model.config import BackboneConfig
from pcl_ext.model.encoded import Encoded, pool

TEXT_DIM = 256


class Memory(nn.Module):
    """One part of what a task stores. Each method may answer None or 0: "not my business"."""

    num_features = 0
    standardise = True  # whether the head scales these features to mean 0, deviation 1 before the task learns
    every_state = False  # whether features() reads the states of all rows, not the newest ones alone

    def tail(self) -> Tensor | None:
        """[P, D], added to the P newest embeddings of a history, row P - 1 to the newest."""
        return None

    def prefix(self) -> Tensor | None:
        """[P, D], rows in front of a history."""
        return None

    def features(self, encoded: Encoded) -> Tensor | None:
        """[B, num_features], what the head reads."""
        return None


class TailPrompt(Memory):
    """Position-wise prompt (Eq. 1). Starts at zero: the frozen backbone itself."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(length, dim))

    def tail(self) -> Tensor:
        return self.rows


class PrefixPrompt(Memory):
    """Learned tokens in front of every history."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, dim) * dim**-0.5)

    def prefix(self) -> Tensor:
        return self.rows


class LastState(Memory):
    """Reads the newest state."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.num_features = config.dim

    def features(self, encoded: Encoded) -> Tensor:
        return encoded.newest


class MeanStates(Memory):
    """Reads the means over time of the embeddings and of every layer's states, and the history's length."""

    every_state = True

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.depths = range(config.num_layers + 1)
        self.num_features = len(self.depths) * config.dim + 1

    def features(self, encoded: Encoded) -> Tensor:
        return torch.cat([encoded.mean(depth) for depth in self.depths] + [encoded.log_lengths()], dim=1)


class ItemMemory(Memory):
    """A table of the task's own, [V + 1, width], summed over the history and divided by sqrt(n): memory by item.

    While the task learns, each event is left out with probability `dropout`: the bag of items must not be learned by
    heart.
    """

    standardise = False

    def __init__(self, config: BackboneConfig, width: int, dropout: float):
        super().__init__()
        self.num_features, self.dropout = width, dropout
        self.table = nn.Parameter(torch.randn(config.num_items + 1, width) * 0.1)

    def features(self, encoded: Encoded) -> Tensor:
        scale = encoded.offsets.diff().clamp_min(1).to(self.table.dtype).rsqrt()
        weights = F.dropout(scale[encoded.users()], self.dropout, self.training)
        return pool(self.table, encoded.items, encoded.offsets, weights)


class ContextualPrompt(nn.Module):
    """Attention over tasks whose answer [P, D] is added to a task's prompt, and folded into it on closing.

    query: the task's text plus a learned row per prompt position; keys: projected texts of tasks 1..k; values: their
    projected texts, or with `prompts` given the stored rows of tasks 1..k-1, row by row. The output projection starts
    at zero, so the task starts at the frozen backbone. The texts are constants: so is the answer, once trained.

    texts [k, TEXT_DIM], the task's own last; prompts [j, P, D], the stored prompts of the first j tasks.
    """

    def __init__(self, texts: Tensor, prompts: Tensor | None, length: int, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.register_buffer("texts", texts)
        self.register_buffer("prompts", prompts)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.query = nn.Linear(TEXT_DIM, dim)
        self.key = nn.Linear(TEXT_DIM, dim)
        self.value = nn.Linear(TEXT_DIM if prompts is None else dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self) -> Tensor:
        """[P, D]; 0 where there is nothing to attend to."""
        length, dim = self.positions.shape
        if self.prompts is not None and not len(self.prompts):
            return torch.zeros_like(self.positions)
        known = self.texts if self.prompts is None else self.texts[: len(self.prompts)]
        values = self.value(known if self.prompts is None else self.prompts)  # [k, D] or [j, P, D]
        query = (self.query(self.texts[-1]) + self.positions).view(length, self.num_heads, -1)
        key = self.key(known).view(len(known), self.num_heads, -1)
        weights = torch.einsum("phd,khd->phk", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
        pattern = "phk,khd->phd" if self.prompts is None else "phk,kphd->phd"
        mixed = torch.einsum(pattern, weights, values.unflatten(-1, (self.num_heads, -1)))
        return self.out(mixed.reshape(length, dim))


def hashed_text_vector(text: str) -> Tensor:
    """[TEXT_DIM] float32 of length 1: signed counts of a text's words and word pairs, hashed; always the same bits."""
    words = re.findall(r"\w+", text.lower())
    vector = torch.zeros(TEXT_DIM)
    for feature in words + [" ".join(pair) for pair in zip(words, words[1:])]:
        digest = hashlib.sha256(feature.encode()).digest()
        vector[int.from_bytes(digest[:4], "big") % TEXT_DIM] += 1.0 if digest[4] % 2 else -1.0
    return vector / vector.norm().clamp_min(1e-12)
