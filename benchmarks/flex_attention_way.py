"""prompt_attention by FlexAttention, compiled: packed rows, shared prompts first among the keys, a mask of documents.

Forward only: FlexAttention has no backward on the CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

_compiled = torch.compile(flex_attention, dynamic=False)


def flex_attention_way(rows: list[Tensor], prefix: list[Tensor], offsets: Tensor) -> Callable[[], Tensor]:
    """rows q, k, v [T, H, d], prefix k, v [M, H, d] that all see, offsets [B + 1] -> forward() -> [T, H, d].

    The layout [1, H, M + T, d] and the mask of blocks are made here, outside the clock; compiling takes seconds.
    """
    prompts, total = len(prefix[0]), len(rows[0])
    user = torch.repeat_interleave(offsets.diff())

    def sees(_batch, _head, row: Tensor, key: Tensor) -> Tensor:
        own = key - prompts
        return (own < 0) | ((own <= row) & (user[own.clamp_min(0)] == user[row]))

    torch.compiler.reset()  # shapes seen before count, and past a limit of them it would run uncompiled
    keys = [torch.cat([p, x]) for p, x in zip(prefix, rows[1:])]
    inputs = [x.transpose(0, 1)[None].contiguous() for x in (rows[0], *keys)]
    mask = create_block_mask(sees, None, None, total, prompts + total, device="cpu")

    def forward() -> Tensor:
        return _compiled(*inputs, block_mask=mask)[0].transpose(0, 1)

    with torch.no_grad():
        forward()
    return forward
