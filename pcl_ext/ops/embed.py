"""embed: item, position and tail-prompt rows of packed histories, added up."""

import torch
from torch import Tensor

from pcl_ext.ops import embed_op, reference
from pcl_ext.ops._check import (
    FLOATS,
    INTEGERS,
    are_plain_offsets,
    check_like,
    check_offsets,
    check_shape,
    check_tensor,
    is_plain,
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
    may be left out when K == 1. Raises ValueError or TypeError naming what is wrong. Values are looked at on the
    CPU alone: on CUDA an id outside 0..V reads row 0, rows past max_len read the last position, and a prompt_index
    outside 0..K-1 is none.
    """
    if not _is_right(items, offsets, table, position, prompt, prompt_index):
        _check(items, offsets, table, position, prompt, prompt_index)
    if use_fused(impl, table, cuda=FLOATS):
        inputs = (items, offsets, table, position, prompt, prompt_index)
        return call(torch.ops.pcl_ext.embed.default, embed_op.forward, *inputs)
    if reads_values(items):
        check_embed_values(items, offsets, table, position, prompt, prompt_index)
    return reference.embed(items, offsets, table, position, prompt, prompt_index)


def _is_right(items, offsets, table, position, prompt, prompt_index) -> bool:
    """Whether all are ordinary CPU tensors that fit each other; no means that _check has to look."""
    if not (is_plain(items, 1, INTEGERS) and are_plain_offsets(offsets) and is_plain(table, 2, FLOATS)):
        return False
    (table_rows, dim), dtypes = table.shape, (table.dtype,)
    if table_rows == 0 or not (position is None or (is_plain(position, 2, dtypes) and position.shape[1] == dim)):
        return False
    if prompt is None:
        return prompt_index is None
    if not is_plain(prompt, 3, dtypes) or prompt.shape[2] != dim:
        return False
    if prompt_index is None:
        return prompt.shape[0] == 1
    return is_plain(prompt_index, 1, (torch.int64,)) and prompt_index.shape[0] == offsets.shape[0] - 1


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
