"""plan_batches against what one would write: sort by length and cut where a batch is full."""

import torch
from measure import Report, lengths_of, main, medians_ms
from torch import Tensor

from pcl_ext import ops

SHAPES = [(10_000, 64), (1_000_000, 64), (1_000_000, 200)]  # users, mean length
MAX_TOKENS = 16_384


def sort_and_cut(lengths: Tensor, seed: int) -> list[Tensor]:
    """Neighbours by length, in batches of at most MAX_TOKENS rows; the batches shuffled."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.argsort(lengths)
    cuts, tokens = [], 0
    for i, length in enumerate(lengths[order].tolist()):
        if tokens + length > MAX_TOKENS and tokens:
            cuts.append(i)
            tokens = 0
        tokens += length
    batches = order.tensor_split(cuts)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def fullest_and_mean(batches: list[Tensor], lengths: Tensor) -> tuple[int, float]:
    """Rows of the fullest batch and of the mean one."""
    rows = torch.stack([lengths[batch].sum() for batch in batches])
    return int(rows.max()), float(rows.double().mean())


def bench(report: Report, users: int, mean: int) -> None:
    lengths = lengths_of(users, mean)
    batches, others = ops.plan_batches(lengths, MAX_TOKENS), sort_and_cut(lengths, 0)
    for way in (batches, others):  # no speed without truth
        assert torch.equal(torch.cat(way).sort().values, torch.arange(users))
        assert fullest_and_mean(way, lengths)[0] <= MAX_TOKENS
    if users <= 10_000:
        twin = ops.plan_batches(lengths, MAX_TOKENS, impl="reference")
        assert [b.tolist() for b in batches] == [b.tolist() for b in twin]
    ways = {"fused": lambda: ops.plan_batches(lengths, MAX_TOKENS), "theirs": lambda: sort_and_cut(lengths, 0)}
    ours, other = medians_ms(ways).values()
    fullest, average = fullest_and_mean(batches, lengths)
    name = f"{users} users, mean {mean}"
    report.row(name, other / ours, ours, other, len(batches), len(others), 100 * (fullest / average - 1))


if __name__ == "__main__":
    columns = ["what", "ratio", "plan_batches", "sort and cut", "batches", "sorted", "fullest over mean, %"]
    main(f"plan_batches, {MAX_TOKENS} rows a batch; milliseconds", columns, bench, SHAPES)
