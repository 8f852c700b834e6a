"""Time per useful row of attention and of encoding, from 100 to 100,000 users a call: is it flat?

The same users every time, cut into calls, largest calls ten times the same. Encoding goes from stored histories to user
vectors through batches of at most 16,384 rows, as evaluation does. A call's result is let go before the next call, as
in a loop that uses it; figures are medians over calls. What does not fit into memory is left out.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from measure import Report, lengths_of, to_offsets
from padded_model import MAX_LEN, PaddedModel, in_groups, make_model
from torch import Tensor

from pcl_ext import UserModel, ops
from pcl_ext.batch import PackedBatch

DIM, HEADS, BATCH_ROWS = 64, 2, 16_384
SIZES = [100, 1000, 10_000, 100_000]  # users a call


def free_bytes() -> int:
    """Memory that a process can have, as the system tells it; 0 where it does not."""
    info = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in info.read_text().splitlines()) if info.exists() else {}
    return 1024 * int(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else 0


Calls = list[tuple[Callable[[], Tensor], int]]  # each with the rows it does


def attention_calls(rows: Tensor, offsets: Tensor, size: int) -> Calls:
    """prompt_attention over rows [T, 3, H, d], `size` users a call."""
    calls = []
    for first in range(0, len(offsets) - 1, size):
        own = offsets[first : first + size + 1]
        q, k, v = rows[int(own[0]) : int(own[-1])].unbind(1)
        given, plan = (q, k, v, own - own[0]), ops.attention_plan(own - own[0])
        calls.append((partial(ops.prompt_attention, *given, plan=plan), len(q)))
    return calls


def encode_calls(model: UserModel, items: Tensor, offsets: Tensor, size: int) -> Calls:
    """encode from stored histories, `size` users a call; vectors in the order of the users."""
    users, lengths = torch.arange(len(offsets) - 1), offsets.diff()

    def call(users: Tensor) -> Tensor:
        batches = [users[rows] for rows in ops.plan_batches(lengths[users], BATCH_ROWS)]
        gathered = [PackedBatch.from_packed(*ops.gather_histories(items, offsets, b, MAX_LEN)) for b in batches]
        vectors = torch.cat([model.encode(batch, ["items"])["items"] for batch in gathered])
        return vectors[torch.argsort(torch.cat(batches))]

    return [(partial(call, part), int(lengths[part].sum())) for part in users.split(size)]


def nanoseconds_a_row(ways: dict[int, Calls], turns: int = 6) -> dict[int, float]:
    """The median over the calls of each way; ways take turns, the first of which is not counted."""
    times: dict[int, list[float]] = {size: [] for size in ways}
    for turn in range(1 + turns):
        for size, calls in ways.items():
            for call, rows in calls:
                begin = time.perf_counter_ns()
                call()
                if turn:
                    times[size].append((time.perf_counter_ns() - begin) / rows)
    return {size: median(calls) for size, calls in times.items()}


def reference_attention(rows: Tensor, lengths: Tensor) -> Tensor:
    """What attention gives the first 100 users, by the op's twin."""
    offsets = to_offsets(lengths[:100])
    return ops.prompt_attention(*rows[: int(offsets[-1])].unbind(1), offsets, impl="reference")


def padded_vectors(model: UserModel, items: Tensor, lengths: Tensor) -> Tensor:
    """The vectors of the first 100 users, by the padded model."""
    offsets = to_offsets(lengths[:100])
    groups = in_groups(PackedBatch.from_packed(items[: int(offsets[-1])], offsets), 1)
    return PaddedModel(model.backbone).vectors(groups, model.task("items").tail(), ("last",))[0]


def bench(report: Report, sizes: list[int]) -> None:
    model, most = make_model(DIM, HEADS).eval(), max(s for s in sizes if s <= 10_000)
    lengths = lengths_of(most, 64).clamp_max(MAX_LEN)
    items, rows = torch.randint(1, 2000, (int(lengths.sum()),)), torch.randn(int(lengths.sum()), 3, HEADS, DIM // HEADS)
    sizes = [s for s in sizes if s <= most or s // most * rows.nbytes * 2 < free_bytes()]
    attention, encode = {}, {}
    for size in sizes:
        times = max(1, size // most)
        offsets = to_offsets(lengths.repeat(times))
        attention[size] = attention_calls(rows.repeat(times, 1, 1, 1) if times > 1 else rows, offsets, size)
        encode[size] = encode_calls(model, items.repeat(times), offsets, size)
    for ways, want in (
        (attention, reference_attention(rows, lengths)),
        (encode, padded_vectors(model, items, lengths)),
    ):
        for calls in ways.values():  # no speed without truth
            torch.testing.assert_close(torch.cat([call() for call, _ in calls])[: len(want)], want)
    per_row = [nanoseconds_a_row(ways) for ways in (attention, encode)]
    for size in sizes:
        ratios = [row[size] / min(row.values()) for row in per_row]
        report.row(size, *ratios, *(row[size] for row in per_row))


if __name__ == "__main__":
    torch.manual_seed(0)
    columns = ["users a call", "attention / its fastest", "encode / its fastest", "attention", "encode"]
    report = Report(f"flat, users of mean length 64, D {DIM}; nanoseconds a row", columns)
    with torch.no_grad():
        bench(report, report.shapes(SIZES, [10, 20]))
    report.close()
