"""to_packed against PyTorch's boolean mask, and against a plain copy of the same bytes."""

import torch
from measure import Report, copy_of, lengths_of, medians_ms, to_offsets

from pcl_ext import ops

USERS = 512
SHAPES = [(mean, dim) for mean in (20, 64, 200) for dim in (64, 256)]  # mean length, width


def bench(report: Report, mean: int, dim: int) -> None:
    lengths = lengths_of(USERS, mean)
    offsets, total, longest = to_offsets(lengths), int(lengths.sum()), int(lengths.max())
    packed = torch.randn(total, dim)
    mask = torch.arange(longest) < lengths[:, None]
    padded = ops.to_padded(packed, offsets, longest, impl="reference")
    moved = 2 * packed.nbytes  # read, written

    def fused():
        return ops.to_packed(padded, offsets, total, impl="fused")

    def theirs():
        return padded[mask]

    torch.testing.assert_close(fused(), theirs(), rtol=0, atol=0)  # no speed without truth
    ways = {"fused": fused, "theirs": theirs, "copy": copy_of(moved)}
    ours, other, copy = medians_ms(ways).values()
    report.row(f"mean {mean}, D {dim}", other / ours, ours, other, copy, 100 * copy / ours)


if __name__ == "__main__":
    torch.manual_seed(0)
    report = Report(f"to_packed, {USERS} users; milliseconds", ["what", "ratio", "fused", "mask", "copy", "% of copy"])
    for shape in report.shapes(SHAPES):
        bench(report, *shape)
    report.close()
