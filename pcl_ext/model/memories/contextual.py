"""The contextual prompt: attention over tasks that folds into a stored prompt."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

TEXT_DIM = 256


class ContextualPrompt(nn.Module):
    """Attention over tasks whose answer [P, D] is added to a task's prompt, and folded into it on closing.

    query: the task's text plus a learned row per prompt position; keys: projected texts of tasks 1..k; values: their
    projected texts, or with `prompts` given the stored rows of tasks 1..k-1, row by row. The output projection starts
    at zero, so the task starts at the frozen backbone. The texts are constants: so is the answer, once trained.

    texts [k, TEXT_DIM], the task's own last; prompts [j, P, D], the stored prompts of the first j tasks, j > 0.
    """

    texts: Tensor
    prompts: Tensor | None

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
        """[P, D]."""
        length, dim = self.positions.shape
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
    vector = torch.zeros(TEXT_DIM, dtype=torch.float32)
    for feature in words + [" ".join(pair) for pair in zip(words, words[1:])]:
        digest = hashlib.sha256(feature.encode()).digest()
        vector[int.from_bytes(digest[:4], "big") % TEXT_DIM] += 1.0 if digest[4] % 2 else -1.0
    return vector / vector.norm().clamp_min(1e-12)
