"""prompt_attention on the GPU against varlen attention, FlexAttention and padded attention of PyTorch.

The peers get their inputs ready, outside the clock: prompts in front of every history's keys (varlen), of all keys
(FlexAttention), or of every padded history's queries too (padded).
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from flex_attention_way import flex_attention_way
from gpu_measure import Bench, Work, assert_as_right_as
from torch import Tensor

from pcl_ext import ops

USERS, HEADS, PROMPTS, MOST = 4096, 4, 16, 512
SHAPES = [(100, 64), (20, 64), (400, 64), (100, 32), (100, 128)]  # mean length, head width


def varlen_stand_in(signature: inspect.Signature) -> Callable:
    """On the CPU there is no varlen attention: the same call, checked against its signature, one history at a time."""

    def attend(*args, **options) -> Tensor:
        signature.bind(*args, **options)
        q, k, v, cu_q, cu_k = args[:5]
        out = []
        for b in range(len(cu_q) - 1):
            rows = q[cu_q[b] : cu_q[b + 1]], k[cu_k[b] : cu_k[b + 1]], v[cu_k[b] : cu_k[b + 1]]
            n, m = len(rows[0]), len(rows[1])
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in rows)
            out.append(F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=mask)[0].transpose(0, 1))
        return torch.cat(out)

    return attend


def varlen_way(bench: Bench, rows: list[Tensor], prefix: list[Tensor], offsets: Tensor, longest: int) -> tuple:
    """forward() and its inputs: k and v with the prefix in front of every history."""
    from torch.nn.attention.varlen import varlen_attn

    signature = inspect.signature(varlen_attn)
    attend = varlen_stand_in(signature) if bench.dry else varlen_attn
    causal = {"window_size": (-1, 0)} if "window_size" in signature.parameters else {"is_causal": True}
    batch, total = offsets.shape[0] - 1, rows[0].shape[0]
    user = torch.repeat_interleave(offsets.diff())
    own = torch.arange(total, device=bench.device) + (user + 1) * PROMPTS
    shared = offsets[:-1, None] + torch.arange(batch * PROMPTS, device=bench.device).view(batch, PROMPTS)
    keys = []
    for x, p in zip(rows[1:], prefix):
        both = x.new_empty(total + batch * PROMPTS, *x.shape[1:])
        both[own], both[shared] = x, p
        keys.append(both)
    inputs = [x.detach().requires_grad_() for x in (rows[0], *keys)]
    cu_q = offsets.int()
    cu_k = (offsets + PROMPTS * torch.arange(batch + 1, device=bench.device)).int()

    def forward() -> Tensor:
        return attend(*inputs, cu_q, cu_k, longest, longest + PROMPTS, **causal)

    return forward, inputs


def padded_way(rows: list[Tensor], prefix: list[Tensor], offsets: Tensor, longest: int) -> tuple:
    """forward() of padded histories with prompts as their first tokens, [B, H, P + L, d], and its inputs."""
    batch, inputs = offsets.shape[0] - 1, []
    for x, p in zip(rows, [torch.zeros_like(prefix[0]), *prefix]):  # prompts ask nothing
        padded = ops.to_padded(x, offsets, longest, impl="reference")
        both = torch.cat([p.expand(batch, *p.shape), padded], 1)
        inputs.append(both.transpose(1, 2).contiguous().requires_grad_())
    return lambda: F.scaled_dot_product_attention(*inputs, is_causal=True), inputs


def with_backward(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and the gradients of all inputs."""
    grad_out = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, grad_out)


def without_grad(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Forward alone."""

    def run() -> Tensor:
        with torch.no_grad():
            return forward()

    return run


class Shape:
    """Inputs of one shape, and what must move and be computed for it."""

    def __init__(self, bench: Bench, mean: int, dim: int, dtype: torch.dtype):
        self.bench, self.dtype = bench, dtype
        lengths, self.offsets, self.longest = bench.users(USERS, mean, MOST)
        total = int(lengths.sum())
        self.rows = [bench.random(total, HEADS, dim, dtype=dtype) for _ in range(3)]
        self.prefix = [bench.random(PROMPTS, HEADS, dim, dtype=dtype) for _ in range(2)]
        self.prefix_offsets = torch.tensor([0, PROMPTS], device=bench.device)
        plan = ops.attention_plan(self.offsets.cpu(), self.prefix_offsets.cpu())
        self.plan = plan.to(bench.device)
        self.grad_out = torch.ones_like(self.rows[0])
        self.pairs = int((lengths * PROMPTS + lengths * (lengths + 1) // 2).sum())
        self.flops_a_pair, self.element_bytes = 4 * dim * HEADS, total * HEADS * dim * self.rows[0].element_size()
        self.prefix_pairs = total * PROMPTS

    def fused(self, q, k, v, prefix_k, prefix_v, *, impl: str = "fused") -> Tensor:
        """prompt_attention."""
        rest = (self.offsets, prefix_k, prefix_v, self.prefix_offsets)
        return ops.prompt_attention(q, k, v, *rest, plan=self.plan, impl=impl)

    def peers(self, wrap: Callable) -> dict[str, Callable]:
        """Builders of forward, or with its gradients, by wrap(forward, inputs)."""
        rows, prefix, offsets = self.rows, self.prefix, self.offsets
        ways = {
            "varlen": lambda: wrap(*varlen_way(self.bench, rows, prefix, offsets, self.longest)),
            "padded": lambda: wrap(*padded_way(rows, prefix, offsets, self.longest)),
        }
        if self.dtype == torch.float32 and not self.bench.dry:
            del ways["varlen"]  # takes two-byte numbers alone
        return ways

    def forward_work(self) -> Work:
        """q, k and v in, the output out."""
        return Work(4 * self.element_bytes, self.flops_a_pair * self.pairs, self.dtype)

    def both_work(self) -> Work:
        """With the backward pass: q, k, v, the output and its gradient in, three gradients out."""
        return Work((4 + 8) * self.element_bytes, 3.5 * self.flops_a_pair * self.pairs, self.dtype)

    def check(self) -> None:
        """A few histories against float64, and against PyTorch in the same dtype."""
        few = min(8, self.offsets.shape[0] - 1)
        end = int(self.offsets[few])
        inputs = [*(x[:end] for x in self.rows), *self.prefix]
        rest = {"impl": "reference", "offsets": self.offsets[: few + 1], "prefix_offsets": self.prefix_offsets}

        def reference(x: list[Tensor]) -> Tensor:
            return ops.prompt_attention(*x[:3], prefix_k=x[3], prefix_v=x[4], **rest)

        ours = self.fused(*self.rows, *self.prefix)
        assert_as_right_as(ours[:end], reference(inputs), reference([x.double() for x in inputs]))


def ours_forward(shape: Shape) -> Callable[[], Tensor]:
    """prompt_attention, without gradients."""
    return without_grad(lambda: shape.fused(*shape.rows, *shape.prefix))


def ours_both(shape: Shape) -> Callable[[], object]:
    """prompt_attention and all its gradients."""
    inputs = [x.detach().requires_grad_() for x in [*shape.rows, *shape.prefix]]
    return with_backward(lambda: shape.fused(*inputs), inputs)


def bench_shape(bench: Bench, mean: int, dim: int, dtype: torch.dtype) -> None:
    """Forward, forward and backward, the gradients of the prefix alone."""
    shape = Shape(bench, mean, dim, dtype)
    name = f"prompt_attention, {str(dtype)[6:]}, mean {mean}, d {dim}"

    def forward():
        shape.check()
        return ours_forward(shape), shape.peers(lambda forward, _: without_grad(forward)), shape.forward_work()

    def both():
        return ours_both(shape), shape.peers(with_backward), shape.both_work()

    def prefix_only():
        prefix = [x.detach().requires_grad_() for x in shape.prefix]
        out = shape.fused(*shape.rows, *prefix)
        work = Work(3 * shape.element_bytes, 2 * shape.flops_a_pair * shape.prefix_pairs, dtype)
        return lambda: torch.autograd.grad(out, prefix, shape.grad_out, retain_graph=True), {}, work

    bench.case(f"{name}, forward", forward)
    bench.case(f"{name}, forward and backward", both)
    bench.case(f"{name}, backward of the prefix alone", prefix_only)


def bench_flex(bench: Bench) -> None:
    """Against FlexAttention, which compiles for many seconds; it has no backward on the CPU."""
    shape = Shape(bench, *SHAPES[0], torch.float32 if bench.dry else torch.bfloat16)
    name = f"prompt_attention against FlexAttention, mean {SHAPES[0][0]}, d {SHAPES[0][1]}"

    def way() -> tuple:
        return flex_attention_way(shape.rows, shape.prefix, shape.offsets)

    def forward():
        return ours_forward(shape), {"flex": lambda: without_grad(way()[0])}, shape.forward_work()

    def both():
        return ours_both(shape), {"flex": lambda: with_backward(*way())}, shape.both_work()

    bench.case(f"{name}, forward", forward)
    if not bench.dry:
        bench.case(f"{name}, forward and backward", both)


def run(bench: Bench) -> None:
    """All shapes in bfloat16, the first in the other types; last what takes longest to be ready."""
    for mean, dim in SHAPES[:1] if bench.dry else SHAPES:
        bench_shape(bench, mean, dim, torch.bfloat16)
    for dtype in (torch.float32,) if bench.dry else (torch.float16, torch.float32):
        bench_shape(bench, *SHAPES[0], dtype)
    bench_flex(bench)
