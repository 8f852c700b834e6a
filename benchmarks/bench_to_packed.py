"""to_packed against a boolean mask, index_select by an index made outside the clock, and a copy of the same bytes."""

import torch
from layouts import SHAPES, USERS, make_rows
from measure import Report, copy_of, main, medians_ms

from pcl_ext import ops


def bench(report: Report, mean: int, dim: int) -> None:
    packed, padded, offsets, mask = make_rows(mean, dim)
    index = mask.flatten().nonzero()[:, 0]
    moved = 2 * packed.nbytes  # read, written

    def fused():
        return ops.to_packed(padded, offsets, len(packed), impl="fused")

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
    columns = ["what", "ratio to the best", "fused", "mask", "index_select", "copy", "% of copy"]
    main(f"to_packed, {USERS} users; milliseconds", columns, bench, SHAPES)
