"""embed in float32 against gather + add + add in PyTorch, whose indices are made outside the clock, and against the
shorter way where all users share one prompt: it is added to the first positions, then gather + add."""

import torch
import torch.nn.functional as F
from measure import Report, lengths_of, main, medians_ms, to_offsets

from pcl_ext import ops

USERS, ITEMS, PROMPTS = 512, 10_000, 16
SHAPES = [(mean, dim) for mean in (20, 64, 200) for dim in (64, 256)]  # mean length, width


def bench(report: Report, mean: int, dim: int) -> None:
    lengths = lengths_of(USERS, mean)
    offsets, total = to_offsets(lengths), int(lengths.sum())
    items = torch.randint(1, ITEMS + 1, (total,))
    table = torch.randn(ITEMS + 1, dim)
    position, prompt = torch.randn(int(lengths.max()), dim), torch.randn(1, PROMPTS, dim)
    distance = torch.repeat_interleave(offsets[1:], lengths) - 1 - torch.arange(total)
    row = torch.where(distance < PROMPTS, PROMPTS - 1 - distance, PROMPTS)
    grad_out = torch.randn(total, dim)

    def fused(position, prompt):
        return ops.embed(items, offsets, table, position, prompt, impl="fused")

    def theirs(position, prompt):
        rows = torch.cat([prompt[0], prompt.new_zeros(1, dim)])
        return F.embedding(items, table) + F.embedding(distance, position) + F.embedding(row, rows)

    def folded(position, prompt):
        count = min(PROMPTS, len(position))
        first = position[:count] + prompt[0].flip(0)[:count]
        return F.embedding(items, table) + F.embedding(distance, torch.cat([first, position[count:]]))

    def backward(way):
        leaves = [x.detach().requires_grad_() for x in (position, prompt)]
        return torch.autograd.grad(way(*leaves), leaves, grad_out)

    for way in (theirs, folded):  # no speed without truth
        torch.testing.assert_close(fused(position, prompt), way(position, prompt))
        torch.testing.assert_close(backward(fused), backward(way), rtol=1e-4, atol=1e-4)
    ways = (fused, theirs, folded)
    for what, run in (("forward", lambda way: way(position, prompt)), ("forward and backward", backward)):
        ours, three, two = medians_ms({way.__name__: lambda way=way, run=run: run(way) for way in ways}).values()
        report.row(f"mean {mean}, D {dim}, {what}", three / ours, two / ours, ours, three, two)


if __name__ == "__main__":
    columns = ["what", "gather + add + add / fused", "prompt in the positions / fused", "fused"]
    columns += ["gather + add + add", "prompt in the positions"]
    main(f"embed, float32, {USERS} users; milliseconds", columns, bench, SHAPES)
