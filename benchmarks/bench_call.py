"""What a call costs beside its work: every op on 8 rows without gradient, against an empty Python function."""

from collections.abc import Callable

import torch
from measure import Report, median_ms, to_offsets

from pcl_ext import ops

CALLS = 1000


def microseconds(run: Callable) -> float:
    """Median of a call, in runs of a thousand."""

    def many():
        for _ in range(CALLS):
            run()

    return median_ms(many) * 1e3 / CALLS


def empty(*arguments, **options) -> None:
    """Nothing."""


def calls() -> dict[str, tuple[Callable, tuple, dict]]:
    """The ops by what is measured, their arguments."""
    offsets, prefix_offsets = to_offsets(torch.tensor([3, 5])), torch.tensor([0, 4])
    q, k, v = torch.randn(3, 8, 2, 16)
    prefix = (*torch.randn(2, 4, 2, 16), prefix_offsets)
    items, table, position = torch.randint(1, 100, (8,)), torch.randn(100, 32), torch.randn(10, 32)
    prompt, packed, padded = torch.randn(1, 4, 32), torch.randn(8, 32), torch.randn(2, 5, 32)
    stored = (torch.arange(100, dtype=torch.int32), torch.arange(0, 101, 10), torch.tensor([3, 1]), 4)
    arrays = (*(x.numpy() for x in stored[:3]), 4)
    plan, prefix_plan = ops.attention_plan(offsets), ops.attention_plan(offsets, prefix_offsets)
    ones, zeros, x = torch.ones(32), torch.zeros(32), torch.randn(8, 32)
    weight, hidden = torch.randn(64, 32), torch.randn(64)
    return {
        "linear": (ops.linear, (x, weight, hidden), {"norm": (ones, zeros)}),
        "feed_forward": (ops.feed_forward, (x, (ones, zeros), weight, hidden, weight.T.contiguous(), zeros), {}),
        "prompt_attention, plan": (ops.prompt_attention, (q, k, v, offsets), {"plan": plan}),
        "prompt_attention, prefix, plan": (ops.prompt_attention, (q, k, v, offsets, *prefix), {"plan": prefix_plan}),
        "embed": (ops.embed, (items, offsets, table, position, prompt), {}),
        "to_padded": (ops.to_padded, (packed, offsets, 5), {}),
        "to_packed": (ops.to_packed, (padded, offsets, 8), {}),
        "gather_histories, tensors": (ops.gather_histories, stored, {}),
        "gather_histories, arrays": (ops.gather_histories, arrays, {}),
    }


def bench(report: Report, name: str, op: Callable, arguments: tuple, options: dict) -> None:
    got, want = (op(*arguments, **options, impl=impl) for impl in ("fused", "reference"))
    torch.testing.assert_close(got, want)  # no speed without truth
    ours = microseconds(lambda: op(*arguments, **options))
    nothing = microseconds(lambda: empty(*arguments, **options))
    report.row(name, ours - nothing, ours, nothing)


if __name__ == "__main__":
    torch.manual_seed(0)
    report = Report("a call on 8 rows; microseconds", ["what", "difference", "op", "empty function"])
    for name, call in calls().items():
        bench(report, name, *call)
    report.close()
