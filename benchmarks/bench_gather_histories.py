"""gather_histories against numpy fancy indexing, and against a plain copy of the same bytes."""

import numpy as np
import torch
from measure import Report, copy_of, lengths_of, main, medians_ms, to_offsets

from pcl_ext import ops

# stored users, mean length, picked
SHAPES = [(100_000, 20, 4096), (100_000, 64, 512), (100_000, 64, 8192), (100_000, 200, 512), (100_000, 200, 8192)]


def bench(report: Report, users: int, mean: int, picked: int) -> None:
    lengths = lengths_of(users, mean)
    offsets, rows = to_offsets(lengths), torch.randint(0, users, (picked,))
    values = torch.randint(1, 10_000, (int(lengths.sum()),), dtype=torch.int32)
    flat, longest = values.numpy(), 2 * mean

    def fused():
        return ops.gather_histories(values, offsets, rows, longest, impl="fused")

    def theirs():
        last, kept = offsets[rows + 1].numpy(), lengths[rows].clamp(max=longest).numpy()
        ends = np.cumsum(kept)
        index = np.arange(ends[-1]) + np.repeat(last - ends, kept)
        return torch.from_numpy(flat[index]), torch.from_numpy(np.concatenate([[0], ends]))

    torch.testing.assert_close(fused(), theirs(), rtol=0, atol=0)  # no speed without truth
    ways = {"fused": fused, "theirs": theirs, "copy": copy_of(2 * sum(x.nbytes for x in fused()))}
    ours, other, copy = medians_ms(ways).values()
    report.row(f"{users} users, mean {mean}, {picked} picked", other / ours, ours, other, copy, 100 * copy / ours)


if __name__ == "__main__":
    columns = ["what", "ratio", "fused", "numpy", "copy", "% of copy"]
    main("gather_histories, int32; milliseconds", columns, bench, SHAPES)
