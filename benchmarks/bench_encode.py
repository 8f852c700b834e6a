"""UserModel.encode, no gradient, against a padded PyTorch forward of the same weights, and against length buckets.

All ways get their histories as tensors of ids, padded or packed, with every index made outside the clock. The share of
the matrix-product rate counts all layers on all real rows.
"""

import torch
from measure import Report, main
from padded_model import (
    COLUMNS,
    QUICK,
    SHAPES,
    TASKS,
    PaddedModel,
    assert_as_right_as,
    forward_gflop,
    make_batch,
    make_model,
    padded_ways,
    report_ways,
)


@torch.no_grad()
def bench(report: Report, users: int, dim: int, num_heads: int) -> None:
    model, batch = make_model(dim, num_heads).eval(), make_batch(users)
    gflop = sum(forward_gflop(batch, dim))

    def ways_of(task: str, twin: PaddedModel) -> dict:
        prompt, readout = model.task(task).tail().detach().to(twin.dtype), TASKS[task][1]
        ways = {"fused": lambda: model.encode(batch, [task])[task]}
        for way, (groups, newest_only) in padded_ways(batch, readout).items():
            ways[way] = lambda groups=groups, newest=newest_only: twin.vectors(groups, prompt, readout, newest)[0]
        return ways

    for task, (_, readout) in TASKS.items():
        name = f"D {dim}, {'last state' if readout == ('last',) else 'last state and means'}"
        ways, exact = (
            ways_of(task, PaddedModel(model.backbone)),
            ways_of(task, PaddedModel(model.backbone, torch.double)),
        )
        padded = ways["padded"]()
        for way in ways.values():
            torch.testing.assert_close(way(), padded)  # no speed without truth
        report_ways(report, f"{name}, float32", ways, gflop, torch.float32)
        want, ways = exact["padded"](), ways_of(task, PaddedModel(model.backbone, linear_dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            assert_as_right_as([ways["fused"]()], [ways["padded"]()], [want])
            report_ways(report, f"{name}, bfloat16", ways, gflop, torch.bfloat16)


if __name__ == "__main__":
    main("encode, users of mean length 64, no gradient, 2 layers; milliseconds", COLUMNS, bench, SHAPES, QUICK)
