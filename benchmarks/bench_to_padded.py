"""to_padded against PyTorch's boolean mask, and against a plain copy of the same bytes."""

import torch
from layouts import SHAPES, USERS, make_rows
from measure import Report, copy_of, main, medians_ms

from pcl_ext import ops


def bench(report: Report, mean: int, dim: int) -> None:
    packed, padded, offsets, mask = make_rows(mean, dim)
    moved = packed.nbytes + padded.nbytes  # read, written

    def fused():
        return ops.to_padded(packed, offsets, padded.shape[1], impl="fused")

    def theirs():
        out = torch.zeros_like(padded)
        out[mask] = packed
        return out

    torch.testing.assert_close(fused(), theirs(), rtol=0, atol=0)  # no speed without truth
    ways = {"fused": fused, "theirs": theirs, "copy": copy_of(moved)}
    ours, other, copy = medians_ms(ways).values()
    report.row(f"mean {mean}, D {dim}", other / ours, ours, other, copy, 100 * copy / ours)


if __name__ == "__main__":
    columns = ["what", "ratio", "fused", "mask", "copy", "% of copy"]
    main(f"to_padded, {USERS} users; milliseconds", columns, bench, SHAPES)
