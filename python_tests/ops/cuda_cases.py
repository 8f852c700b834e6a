"""What tests of the CUDA kernels share: cases on a device, the bound they keep, offsets that nobody has checked."""

import torch
from attention_cases import Case, assert_as_right_as

MOST, LEAST = 2**63 - 1, -(2**63)
OFFSETS = {
    "falling": [0, 9, 3, 12],
    "past the end": [0, 5, 30, 12],
    "negative": [-7, -3, 4, 12],
    "not from 0": [5, 6, 7, 12],
    "short": [0, 1, 2, 3],
    "huge": [LEAST, MOST, LEAST, MOST],
    "huge and small": [MOST, LEAST, 0, -1],
    "a long history": [0, 0, 12, 12],
}
TOTAL = 12
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on(case: Case, device: str) -> Case:
    """The same on another device."""
    rows = {n: None if x is None else x.detach().to(device).requires_grad_() for n, x in case.rows.items()}
    layout = (case.offsets, case.prefix_offsets, case.prefix_index)
    return Case(rows, *(None if x is None else x.to(device) for x in layout))


def some_grad(case: Case) -> torch.Tensor:
    return torch.randn(case.rows["q"].shape).to(case.rows["q"].device, case.rows["q"].dtype)


def compare(case: Case, device: str, **options) -> None:
    """The kernels against the twin, by the bound of assert_as_right_as."""
    case = on(case, device)
    grad_out = some_grad(case)
    want = case.run_with_grads(grad_out, impl="reference", **options)
    got = case.run_with_grads(grad_out, impl="fused", **options)
    assert_as_right_as(got, want, case.to(torch.float64).run_with_grads(grad_out, impl="reference", **options))
