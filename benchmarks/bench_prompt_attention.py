"""prompt_attention in float32 and bfloat16 against the ways PyTorch has: padding, length buckets, a loop of histories.

PyTorch's ways get their inputs padded, with the prompts already in place, outside the clock. The roofline is the
longer of two times measured in turn with the rest: the best matrix product's for this work, and a copy's of the bytes
that have to be read and written.
"""

import torch
import torch.nn.functional as F
from flex_attention_way import flex_attention_way
from measure import (
    PRODUCT_GFLOP,
    Report,
    copy_of,
    lengths_of,
    main,
    matrix_products,
    medians_ms,
    release_memory,
    to_offsets,
)
from torch import Tensor

from pcl_ext import ops

ROWS, PROMPTS, HEADS = 16_384, 16, 4
SHAPES = [(mean, dim) for mean in (20, 64, 400) for dim in (32, 64, 128)]  # mean length, head width
DTYPES = [torch.float32, torch.bfloat16]
BUCKETS = [8, 16, 32, 64]


def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """No speed without truth: at most twice as far from the result in float64 as PyTorch is."""
    error, allowed = ((x.double() - exact).norm() for x in (ours, theirs))
    assert error <= 2 * allowed, f"error {error:.3e}, PyTorch's {allowed:.3e}"


class Tokens:
    """Prompts as the first tokens of every history, in groups padded to their longest: [b, H, P + L, d].

    asks  whether prompts are queries too, of zeros, with is_causal; otherwise a mask says what rows see
    """

    def __init__(self, rows: list[Tensor], prefix: list[Tensor], lengths: Tensor, groups: int, asks: bool = True):
        self.asks, self.skipped = asks, PROMPTS if asks else 0
        order = torch.argsort(lengths) if groups > 1 else torch.arange(len(lengths))
        offsets = to_offsets(lengths)
        self.members = [part for part in order.chunk(groups) if len(part)]
        self.inputs = []
        for part in self.members:
            padded = []
            for x, p in zip(rows, prefix if asks else [prefix[0][:0], *prefix[1:]]):
                packed = torch.cat([x[offsets[b] : offsets[b + 1]] for b in part])
                own = ops.to_padded(packed, to_offsets(lengths[part]), int(lengths[part].max()))
                both = torch.cat([p.expand(len(part), *p.shape), own], 1).transpose(1, 2).contiguous()
                padded.append(both.requires_grad_())
            self.inputs.append(padded)
        self.lengths = lengths
        longest = [group[0].shape[2] for group in self.inputs]
        self.masks = [] if asks else [torch.ones(n, PROMPTS + n, dtype=torch.bool).tril(PROMPTS) for n in longest]

    def forward(self) -> list[Tensor]:
        """One call of PyTorch's attention a group."""
        if self.asks:
            return [F.scaled_dot_product_attention(*group, is_causal=True) for group in self.inputs]
        return [F.scaled_dot_product_attention(*group, attn_mask=mask) for group, mask in zip(self.inputs, self.masks)]

    def backward(self) -> None:
        """Gradients of everything."""
        for group, out in zip(self.inputs, self.forward()):
            torch.autograd.grad(out, group, torch.ones_like(out))

    def packed(self) -> Tensor:
        """The real rows, in the order of the users."""
        rows = [None] * len(self.lengths)
        for part, out in zip(self.members, self.forward()):
            for b, user in zip(part.tolist(), out):
                rows[b] = user[:, self.skipped : self.skipped + int(self.lengths[b])].transpose(0, 1)
        return torch.cat(rows)

    def gradients(self, grad_out: Tensor) -> list[Tensor]:
        """Of q, k, v and the prompts' k and v, packed, for a gradient [T, H, d] of `packed`."""
        leaves = [x for group in self.inputs for x in group]
        found = torch.autograd.grad(self.packed(), leaves, grad_out)
        rows, shared = [[None] * len(self.lengths) for _ in range(3)], [0, 0]
        for part, group in zip(self.members, range(0, len(found), 3)):
            for place, grad in enumerate(found[group : group + 3]):
                skipped = PROMPTS if place else self.skipped
                for b, user in zip(part.tolist(), grad):
                    rows[place][b] = user[:, skipped : skipped + int(self.lengths[b])].transpose(0, 1)
                if place:
                    shared[place - 1] = shared[place - 1] + grad[:, :, :PROMPTS].sum(0).transpose(0, 1)
        return [*map(torch.cat, rows), *shared]


def fused_ways(rows, prefix, offsets):
    """forward(), both() with all gradients, and backward(gradients asked for) -> a call of it alone."""
    prefix_offsets = torch.tensor([0, PROMPTS])
    plan = ops.attention_plan(offsets, prefix_offsets)
    grad_out = torch.ones_like(rows[0])

    def run(inputs):
        q, k, v, prefix_k, prefix_v = inputs
        return ops.prompt_attention(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, plan=plan, impl="fused")

    def forward():
        with torch.no_grad():
            return run([*rows, *prefix])

    def both():
        inputs = [x.detach().requires_grad_() for x in [*rows, *prefix]]
        return torch.autograd.grad(run(inputs), inputs, grad_out)

    def backward(*asked):
        inputs = [x.detach().requires_grad_(i in asked) for i, x in enumerate([*rows, *prefix])]
        out, wanted = run(inputs), [inputs[i] for i in asked]
        return lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)

    return forward, both, backward


def exact_results(rows, prefix, offsets) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of the reference; rows and prefix in float64."""
    inputs = [x.requires_grad_() for x in [*rows, *prefix]]
    out = ops.prompt_attention(*inputs[:3], offsets, *inputs[3:], torch.tensor([0, PROMPTS]), impl="reference")
    return out.detach(), torch.autograd.grad(out, inputs, torch.ones_like(out))


def bench(report: Report, dtype: torch.dtype, mean: int, dim: int) -> None:
    release_memory()
    products = matrix_products(dtype)
    lengths = lengths_of(ROWS // mean, mean)
    total, offsets = int(lengths.sum()), to_offsets(lengths)
    rows = list(torch.randn(3, total, HEADS, dim).to(dtype))
    prefix = list(torch.randn(2, PROMPTS, HEADS, dim).to(dtype))
    forward, both, backward = fused_ways(rows, prefix, offsets)
    blank = torch.zeros(PROMPTS, HEADS, dim, dtype=dtype)  # prompts ask nothing
    tokens = (rows, [blank, *prefix], lengths)
    ways = {groups: Tokens(*tokens, groups) for groups in [1, *BUCKETS, len(lengths)]}
    ways |= {("own", groups): Tokens(*tokens, groups, asks=False) for groups in BUCKETS}
    in_double = ([x.double() for x in rows], [x.double() for x in prefix], offsets)
    exact, exact_grads = exact_results(*in_double)
    with torch.no_grad():
        for way in ways.values():
            check(forward(), way.packed(), exact)
        flex, _ = flex_attention_way(rows, prefix, offsets)
        check(flex(), ways[1].packed(), exact)
    for way in (BUCKETS[-1], ("own", BUCKETS[-1])):
        theirs = ways[way].gradients(torch.ones_like(rows[0]))
        for ours, other, want in zip(both(), theirs, exact_grads, strict=True):
            check(ours, other, want)
    for asked in (range(5), (3, 4)):
        for place, grad in zip(asked, backward(*asked)()):
            assert torch.equal(grad, both()[place]), "gradients alone are those of the whole backward pass"
    flops = 4 * dim * HEADS * int((lengths * PROMPTS + lengths * (lengths + 1) // 2).sum())
    moved = rows[0].nbytes  # of q, k, v and the output forward; backward reads these and one gradient, and writes three
    name = f"{str(dtype)[6:]}, mean {mean}, d {dim}"

    def row(what: str, work: float, times: dict, *others: float) -> None:
        ours, padded = times["ours"], times[1]
        buckets = min(times[way] for groups in BUCKETS for way in (groups, ("own", groups)))
        products_ms = [work / 1e9 / PRODUCT_GFLOP * times[name] for name in products]
        least = [products_ms[0], min(products_ms), max(min(products_ms), times["copy"])]
        shares = [100 * ms / ours for ms in least]
        best = min(padded, buckets, *others)
        report.row(f"{name}, {what}", best / ours, ours, padded, buckets, *(others or ("", "")), *shares)

    with torch.no_grad():
        theirs = {groups: way.forward for groups, way in ways.items()}
        times = medians_ms({"ours": forward, "flex": flex, **theirs, **products, "copy": copy_of(4 * moved)})
    row("forward", flops, times, times[len(lengths)], times["flex"])
    theirs = {groups: way.backward for groups, way in ways.items() if groups != len(lengths)}
    timed = {"ours": both, **theirs, **products, "copy": copy_of(12 * moved)}
    times = medians_ms(timed, least=4)  # seconds a call where padded
    row("forward and backward", 3.5 * flops, times)
    full, alone = medians_ms({"full": backward(*range(5)), "alone": backward(3, 4)}).values()
    report.row(f"{name}, backward: all against prefix only", full / alone, alone, *[""] * 7)


if __name__ == "__main__":
    columns = ["what", "ratio to the best", "fused", "padded", "best of 8 to 64 buckets", "loop", "FlexAttention"]
    columns += ["% of torch's matrix product", "% of the best one", "% of the roofline"]
    shapes, quick = ([(dtype, *shape) for dtype in DTYPES for shape in some] for some in (SHAPES, SHAPES[:1]))
    title = f"prompt_attention, {ROWS} rows, {PROMPTS} prompts, {HEADS} heads; milliseconds"
    main(title, columns, bench, shapes, quick)
