"""prompt_attention by FlexAttention, compiled: packed rows, shared prompts first among the keys, a mask of documents.

On the CPU forward only: FlexAttention has no backward there.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

_compiled = torch.compile(flex_attention, dynamic=False)


def flex_attention_way(
    rows: list[Tensor], prefix: list[Tensor], offsets: Tensor
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """rows q, k, v [T, H, d], prefix k, v [M, H, d] that all see, offsets [B + 1] -> forward() and its inputs.

    forward() gives [T, H, d]. The layout [1, H, M + T, d] and the mask of blocks are made here, outside the clock;
    compiling takes seconds.
    """
    prompts, total = len(prefix[0]), len(rows[0])
    user = torch.repeat_interleave(offsets.diff())

    def sees(_batch, _head, row: Tensor, key: Tensor) -> Tensor:
        own = key - prompts
        return (own < 0) | ((own <= row) & (user[own.clamp_min(0)] == user[row]))

    torch.compiler.reset()  # shapes seen before count, and past a limit of them it would run uncompiled
    keys = [torch.cat([p, x]) for p, x in zip(prefix, rows[1:])]
    inputs = [x.transpose(0, 1)[None].contiguous() for x in (rows[0], *keys)]
    if rows[0].is_cuda:
        inputs = [x.requires_grad_() for x in inputs]
    # compiled on a GPU, where a mask of that many rows would not fit otherwise
    sizes = {"device": rows[0].device.type, "_compile": rows[0].is_cuda}
    mask = create_block_mask(sees, None, None, total, prompts + total, **sizes)

    def forward() -> Tensor:
        return _compiled(*inputs, block_mask=mask)[0].transpose(0, 1)

    with torch.no_grad():
        forward()
    return forward, inputs
