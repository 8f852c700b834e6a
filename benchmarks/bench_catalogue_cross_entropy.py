"""catalogue_cross_entropy in float32, loss and all gradients, against F.cross_entropy of whole scores, and against the
same in blocks of rows under activation checkpointing, which holds as little as the op does."""

import torch
import torch.nn.functional as F
from measure import Report, main, medians_ms, release_memory
from torch.utils.checkpoint import checkpoint

from pcl_ext import ops

SHAPES = [(256, 4_000, 64), (4096, 4_000, 64), (4096, 20_000, 64), (4096, 4_000, 256), (4096, 20_000, 256)]  # T, C, D
BLOCK = 1 << 21  # scores of a block


def bench(report: Report, rows: int, items: int, dim: int) -> None:
    release_memory()
    leaves = [torch.randn(rows, dim) * 0.3, torch.randn(items, dim) * 0.3, torch.randn(items)]
    leaves = [x.requires_grad_() for x in leaves]
    target = torch.randint(items, (rows,))

    def fused(queries, table, bias):
        return ops.catalogue_cross_entropy(queries, table, bias, target, impl="fused")

    def whole(queries, table, bias):
        return F.cross_entropy(F.linear(queries, table, bias), target)

    def block(queries, table, bias, target):
        return F.cross_entropy(F.linear(queries, table, bias), target, reduction="sum")

    def blocks(queries, table, bias):
        parts = zip(queries.split(BLOCK // items), target.split(BLOCK // items))
        return sum(checkpoint(block, q, table, bias, t, use_reentrant=False) for q, t in parts) / rows

    def run(way):
        loss = way(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for way in (whole, blocks):  # no speed without truth
        torch.testing.assert_close(run(fused), run(way), rtol=1e-4, atol=1e-6)
    ways = (fused, whole, blocks)
    ours, theirs, small = medians_ms({way.__name__: lambda way=way: run(way) for way in ways}).values()
    rate = 6 * rows * items * dim / ours / 1e6  # GFLOP/s of its three products
    shares = [100 * rate / report.rates[name] for name in ("float32", "linear")]
    report.row(f"{rows} rows, {items} items, D {dim}", min(theirs, small) / ours, ours, theirs, small, *shares)


if __name__ == "__main__":
    columns = ["what", "best / fused", "fused", "whole scores", "blocks, checkpointed"]
    columns += ["% of torch's product", "% of linear's"]
    main("catalogue_cross_entropy, float32, loss and gradients; milliseconds", columns, bench, SHAPES)
