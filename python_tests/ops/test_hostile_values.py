"""CUDA kernels read offsets and ids that nobody has checked: they stay inside their tensors, and write all of them.

AddressSanitizer watches what lies outside (`make sanitize`, on the emulation), on a GPU compute-sanitizer does.
"""

import pytest
import torch
from cuda_cases import LEAST, MOST, OFFSETS, TOTAL

from pcl_ext import ops


@pytest.mark.parametrize("name", OFFSETS)
def test_to_padded_and_to_packed(name, cuda):
    offsets = torch.tensor(OFFSETS[name], device=cuda)
    packed, padded = torch.randn(TOTAL, 4, device=cuda), torch.randn(3, 5, 4, device=cuda)
    for x in (packed, packed[:, :3], packed.half()[:, :1].contiguous()):
        assert ops.to_padded(x, offsets, 5, impl="fused").isfinite().all()
    for x in (padded, padded[..., :3]):
        assert ops.to_packed(x, offsets, TOTAL, impl="fused").isfinite().all()


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("name", OFFSETS)
def test_embed(name, prompts, cuda):
    def table(*shape):
        return torch.randn(*shape, device=cuda, requires_grad=True)

    tables = [table(7, 4), table(3, 4), table(prompts, 2, 4)]
    items = torch.tensor([0, 6, 7, -1, MOST, LEAST, 2**32, 1, 2, 3, 4, 5], device=cuda)
    index = torch.tensor([MOST, -2, LEAST], device=cuda) if prompts > 1 else None
    out = ops.embed(items, torch.tensor(OFFSETS[name], device=cuda), *tables, index, impl="fused")
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), tables):
        assert grad.isfinite().all()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", OFFSETS)
def test_newest_attention(name, queries, cuda):
    q, k, v = (torch.randn(n, 1, 16, device=cuda, requires_grad=True) for n in (queries, TOTAL, TOTAL))
    offsets = torch.tensor(OFFSETS[name], device=cuda)
    shared = (k, v, torch.tensor(OFFSETS[name][:2], device=cuda))
    guards = [x.detach().clone() for x in (q, k, v)]
    for prefix in ((), shared):
        out = ops.newest_attention(q, k, v, offsets, *prefix, impl="fused")
        torch.autograd.grad(out.sum(), (q, k, v))
    assert all(map(torch.equal, (q, k, v), guards))


def test_ids_outside_the_table_read_row_0(cuda):
    table, offsets = torch.randn(7, 4, device=cuda), torch.tensor([0, 4], device=cuda)
    for dtype in (torch.int32, torch.int64):
        items = torch.tensor([6, 7, -1, 2**31 - 1], dtype=dtype, device=cuda)
        assert torch.equal(ops.embed(items, offsets, table, impl="fused"), table[[6, 0, 0, 0]])


def test_rows_past_the_positions_read_the_last(cuda):
    table, position = torch.zeros(2, 4, device=cuda), torch.randn(3, 4, device=cuda)
    items, offsets = torch.ones(5, dtype=torch.int64, device=cuda), torch.tensor([0, 5], device=cuda)
    got = ops.embed(items, offsets, table, position, impl="fused")
    assert torch.equal(got, position[[2, 2, 2, 1, 0]])


@pytest.mark.parametrize("batch", [0, 1])
def test_rows_without_a_history(batch, cuda):
    offsets, items = (
        torch.zeros(batch + 1, dtype=torch.int64, device=cuda),
        torch.ones(3, dtype=torch.int64, device=cuda),
    )
    assert ops.embed(items, offsets, torch.ones(2, 4, device=cuda), impl="fused").isfinite().all()
    assert ops.to_packed(torch.ones(batch, 2, 4, device=cuda), offsets, 3, impl="fused").isfinite().all()
