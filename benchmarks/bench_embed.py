"""embed in float32 against gather + add + add in PyTorch, whose indices are made outside the clock."""

import torch
import torch.nn.functional as F
from measure import Report, lengths_of, medians_ms, to_offsets

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

    def backward(way):
        leaves = [x.detach().requires_grad_() for x in (position, prompt)]
        return torch.autograd.grad(way(*leaves), leaves, grad_out)

    torch.testing.assert_close(fused(position, prompt), theirs(position, prompt))  # no speed without truth
    torch.testing.assert_close(backward(fused), backward(theirs), rtol=1e-4, atol=1e-4)
    ways = {"fused": fused, "theirs": theirs}
    ours, other = medians_ms({name: lambda way=way: way(position, prompt) for name, way in ways.items()}).values()
    report.row(f"mean {mean}, D {dim}, forward", other / ours, ours, other)
    ours, other = medians_ms({name: lambda way=way: backward(way) for name, way in ways.items()}).values()
    report.row(f"mean {mean}, D {dim}, forward and backward", other / ours, ours, other)


if __name__ == "__main__":
    torch.manual_seed(0)
    report = Report(f"embed, float32, {USERS} users; milliseconds", ["what", "ratio", "fused", "gather + add + add"])
    for shape in report.shapes(SHAPES):
        bench(report, *shape)
    report.close()
