"""Time per useful row of attention and of encoding, from 100 to 100,000 users a call: is it flat?

The same users every time, cut into calls, largest calls ten times the same. Encoding goes from stored histories to user
vectors through batches of at most 16,384 rows, as evaluation does. What does not fit into memory is left out.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from measure import Report, lengths_of, medians_ms, to_offsets
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


def attention_calls(rows: Tensor, offsets: Tensor, size: int) -> Callable:
    """prompt_attention over rows [T, 3, H, d], `size` users a call."""
    calls = []
    for first in range(0, len(offsets) - 1, size):
        own = offsets[first : first + size + 1]
        q, k, v = rows[int(own[0]) : int(own[-1])].unbind(1)
        calls.append((q, k, v, own - own[0], ops.attention_plan(own - own[0])))
    return lambda: [ops.prompt_attention(*call, plan=plan) for *call, plan in calls]


def encode_calls(model: UserModel, items: Tensor, offsets: Tensor, size: int) -> Callable:
    """encode from stored histories, `size` users a call; vectors in the order of the users."""
    users, lengths = torch.arange(len(offsets) - 1), offsets.diff()

    def call(users: Tensor) -> Tensor:
        batches = [users[rows] for rows in ops.plan_batches(lengths[users], BATCH_ROWS)]
        gathered = [PackedBatch.from_packed(*ops.gather_histories(items, offsets, b, MAX_LEN)) for b in batches]
        vectors = torch.cat([model.encode(batch, ["items"])["items"] for batch in gathered])
        return vectors[torch.argsort(torch.cat(batches))]

    return lambda: [call(part) for part in users.split(size)]


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
    attention, encode, total = {}, {}, {}
    for size in sizes:
        times = max(1, size // most)
        offsets, total[size] = to_offsets(lengths.repeat(times)), times * len(items)
        attention[size] = attention_calls(rows.repeat(times, 1, 1, 1) if times > 1 else rows, offsets, size)
        encode[size] = encode_calls(model, items.repeat(times), offsets, size)
    for ways, want in (
        (attention, reference_attention(rows, lengths)),
        (encode, padded_vectors(model, items, lengths)),
    ):
        for way in ways.values():
            torch.testing.assert_close(torch.cat(way())[: len(want)], want)  # no speed without truth
    per_row = []
    for ways in (attention, encode):
        times = medians_ms(ways, least=3)
        per_row.append({size: 1e6 * ms / total[size] for size, ms in times.items()})
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
