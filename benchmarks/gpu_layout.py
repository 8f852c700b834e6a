"""to_padded, to_packed and embed on the GPU, against torch's own jagged kernels and indexing."""

import torch
import torch.nn.functional as F
from gpu_measure import Bench, Work, assert_as_right_as

from pcl_ext import ops

USERS, MEAN, MOST, ITEMS, PROMPTS = 4096, 100, 512, 50_000, 16


def padding(bench: Bench, dim: int, dtype: torch.dtype) -> None:
    """Both directions for rows of dim numbers."""
    lengths, offsets, longest = bench.users(USERS, MEAN, MOST)
    total = int(lengths.sum())
    packed = bench.random(total, dim, dtype=dtype)
    mask = torch.arange(longest, device=bench.device) < offsets.diff()[:, None]
    padded = ops.to_padded(packed, offsets, longest, impl="reference")
    name = f"D {dim}, {str(dtype)[6:]}"

    def index_into():
        out = packed.new_zeros(*padded.shape)
        out[mask] = packed
        return out

    def to_padded():
        def ours():
            return ops.to_padded(packed, offsets, longest, impl="fused")

        def jagged():
            return torch.ops.aten._jagged_to_padded_dense_forward(packed, [offsets], [longest], 0.0)

        assert torch.equal(ours(), padded)
        peers = {"jagged": lambda: jagged, "index": lambda: index_into}
        return ours, peers, Work(packed.nbytes + padded.nbytes, dtype=dtype)

    def to_packed():
        def ours():
            return ops.to_packed(padded, offsets, total, impl="fused")

        def jagged():
            return torch.ops.aten._padded_dense_to_jagged_forward(padded, [offsets], total)

        assert torch.equal(ours(), packed)
        peers = {"jagged": lambda: jagged, "index": lambda: lambda: padded[mask]}
        return ours, peers, Work(2 * packed.nbytes, dtype=dtype)

    bench.case(f"to_padded, {name}", to_padded)
    bench.case(f"to_packed, {name}", to_packed)


def embed(bench: Bench, dim: int, dtype: torch.dtype) -> None:
    """Forward, and the gradients of positions and prompt."""
    lengths, offsets, longest = bench.users(USERS, MEAN, MOST)
    total = int(lengths.sum())
    items = torch.randint(1, ITEMS + 1, (total,), device=bench.device)
    table = bench.random(ITEMS + 1, dim, dtype=dtype)
    position, prompt = bench.random(longest, dim, dtype=dtype), bench.random(1, PROMPTS, dim, dtype=dtype)
    user = torch.repeat_interleave(lengths).to(bench.device)
    distance = offsets[1:][user] - 1 - torch.arange(total, device=bench.device)
    row = torch.where(distance < PROMPTS, PROMPTS - 1 - distance, PROMPTS)
    grad_out = bench.random(total, dim, dtype=dtype)
    number = table.element_size()

    def fused(position, prompt):
        return ops.embed(items, offsets, table, position, prompt, impl="fused")

    def theirs(position, prompt, table=table):
        rows = torch.cat([prompt[0], prompt.new_zeros(1, dim)])
        return F.embedding(items, table) + F.embedding(distance, position) + F.embedding(row, rows)

    def forward():
        exact = theirs(position.double(), prompt.double(), table.double())
        torch.testing.assert_close(fused(position, prompt), exact.to(dtype))
        compiled = torch.compile(theirs, backend=bench.backend, dynamic=False)  # for this shape alone
        peers = {
            "gather + add + add": lambda: lambda: theirs(position, prompt),
            "the same, compiled": lambda: lambda: compiled(position, prompt),
        }
        rows = min(total, ITEMS) + position.shape[0] + PROMPTS
        return lambda: fused(position, prompt), peers, Work(items.nbytes + (rows + total) * dim * number, dtype=dtype)

    def backward():
        def gradients(way):
            leaves = [x.detach().requires_grad_() for x in (position, prompt)]
            out = way(*leaves)
            return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

        ours, other = gradients(fused), gradients(theirs)
        exact = torch.zeros(longest, dim, dtype=torch.float64, device=bench.device)
        exact.index_add_(0, distance, grad_out.double())
        assert_as_right_as(ours()[0], other()[0], exact)
        rows = total + position.shape[0] + PROMPTS
        return ours, {"torch": lambda: other}, Work(rows * dim * number, dtype=dtype)

    bench.case(f"embed forward, D {dim}, {str(dtype)[6:]}", forward)
    bench.case(f"embed backward (position, prompt), D {dim}, {str(dtype)[6:]}", backward)


def run(bench: Bench) -> None:
    """All shapes."""
    for dim, dtype in ((256, torch.bfloat16), (64, torch.bfloat16), (256, torch.float32)):
        padding(bench, dim, dtype)
        embed(bench, dim, dtype)
