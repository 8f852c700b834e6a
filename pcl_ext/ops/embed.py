"""embed: item, position and tail-prompt rows of packed histories, added up."""

import torch
from torch import Tensor

from pcl_ext.ops import reference
from pcl_ext.ops._check import (
    FLOATS,
    INTEGERS,
    check_like,
    check_offsets,
    check_shape,
    check_tensor,
    reads_values,
)
from pcl_ext.ops._native import call, use_fused
from pcl_ext.ops.embed_op import check_embed_values


def embed(
    items: Tensor,
    offsets: Tensor,
    table: Tensor,
    position: Tensor | None = None,
    prompt: Tensor | None = None,
    prompt_index: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """items [T] int32 or int64, offsets [B + 1] int64, table [V + 1, D] -> [T, D].

    A row r steps before its history's end (newest r = 0) gets table[item], plus position[r] of position [max_len, D],
    plus prompt[prompt_index[b], P - 1 - r] of prompt [K, P, D] where r < P. prompt_index [B] int64 is -1 for none and
    may be left out when K == 1. Raises ValueError or TypeError naming what is wrong; on CPU ids outside 0..V are
    refused.
    """
    _check(items, offsets, table, position, prompt, prompt_index)
    if use_fused(impl, table):
        return call(torch.ops.pcl_ext.embed.default, items, offsets, table, position, prompt, prompt_index)
    if reads_values(items):
        check_embed_values(items, offsets, table, position, prompt, prompt_index)
    return reference.embed(items, offsets, table, position, prompt, prompt_index)


def _check(items, offsets, table, position, prompt, prompt_index) -> None:
    check_tensor("items", items, 1, INTEGERS)
    check_offsets("offsets", offsets, "items", items)
    check_tensor("table", table, 2, FLOATS)
    check_like("table", table, "items", items, dtype=False)
    if table.shape[0] == 0:
        raise ValueError("table must hold at least one row, [V + 1, D], got none")
    dim = table.shape[1]
    if position is not None:
        check_tensor("position", position, 2)
        check_like("position", position, "table", table)
        check_shape("position", position, (position.shape[0], dim), "[max_len, D]")
    if prompt is None:
        if prompt_index is not None:
            raise ValueError("prompt_index needs a prompt, got prompt_index without prompt")
        return
    check_tensor("prompt", prompt, 3)
    check_like("prompt", prompt, "table", table)
    check_shape("prompt", prompt, (*prompt.shape[:2], dim), "[K, P, D]")
    if prompt_index is not None:
        check_tensor("prompt_index", prompt_index, 1, (torch.int64,))
        check_like("prompt_index", prompt_index, "items", items, dtype=False)
        check_shape("prompt_index", prompt_index, (offsets.shape[0] - 1,), "[B]")
    elif prompt.shape[0] != 1:
        raise ValueError(f"prompt_index may be left out only when there is one prompt, got {prompt.shape[0]} prompts")
