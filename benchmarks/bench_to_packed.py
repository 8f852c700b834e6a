"""to_packed against a boolean mask, index_select by an index made outside the clock, and a copy of the same bytes."""

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
    index = mask.flatten().nonzero()[:, 0]
    moved = 2 * packed.nbytes  # read, written

    def fused():
        return ops.to_packed(padded, offsets, total, impl="fused")

    def theirs():
        return padded[mask]

    def selected():
        return padded.flatten(0, 1).index_select(0, index)

    for way in (theirs, selected):
        torch.testing.assert_close(fused(), way(), rtol=0, atol=0)  # no speed without truth
    ways = {"fused": fused, "theirs": theirs, "selected": selected, "copy": copy_of(moved)}
    ours, other, select, copy = medians_ms(ways).values()
    best = min(other, select)
    report.row(f"mean {mean}, D {dim}", best / ours, ours, other, select, copy, 100 * copy / ours)


if __name__ == "__main__":
    torch.manual_seed(0)
    columns = ["what", "ratio to the best", "fused", "mask", "index_select", "copy", "% of copy"]
    report = Report(f"to_packed, {USERS} users; milliseconds", columns)
    for shape in report.shapes(SHAPES):
        bench(report, *shape)
    report.close()
