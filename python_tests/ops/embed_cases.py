"""Arguments of embed for the tests."""

import torch
from attention_cases import to_offsets

from pcl_ext import ops


def make(
    lengths,
    *,
    dtype=torch.float32,
    dim=8,
    num_items=11,
    prompts=3,
    prompt_len=4,
    item_dtype=torch.int64,
    device="cpu",
):
    """Arguments of embed by name; tables ask for gradients."""

    def table(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    return {
        "items": torch.randint(0, num_items + 1, (sum(lengths),), dtype=item_dtype).to(device),
        "offsets": to_offsets(lengths).to(device),
        "table": table(num_items + 1, dim),
        "position": table(max(lengths, default=0) + 2, dim),
        "prompt": table(prompts, prompt_len, dim),
        "prompt_index": torch.randint(-1, prompts, (len(lengths),)).to(device),
    }


def with_grads(arguments, grad_out, **options):
    """out and the gradients of the tables given."""
    out = ops.embed(**arguments, **options)
    tables = {n: arguments[n] for n in ("table", "position", "prompt") if arguments.get(n) is not None}
    return {"out": out.detach(), **dict(zip(tables, torch.autograd.grad(out, list(tables.values()), grad_out.to(out))))}
