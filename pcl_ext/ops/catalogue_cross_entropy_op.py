"""pcl_ext::catalogue_cross_entropy: schema, kernel, fake, autograd. Its gradients come with the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_ext.ops._native import BEST_ISA, C, address, below_autograd, check_int64, define, once_only

_WIDTH = 16  # the kernel reads whole vectors of this many numbers

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    queries, table, bias, target, log_expected, seen, first, older, offsets, users, wanted, *, isa=BEST_ISA
) -> Results:
    """loss (), and its gradients of queries, table and bias, each empty where not wanted."""
    rows, dim = queries.shape
    if rows == 0:
        return _nothing(queries, table, bias, wanted)
    queries, table = (F.pad(x, (0, -dim % _WIDTH)).contiguous() for x in (queries, table))
    pointers = (queries, table, bias, target, log_expected, seen, first, older, offsets, users)
    pointers = [None if x is None else x.contiguous() for x in pointers]
    losses = queries.new_empty(rows)
    grads = [torch.empty_like(x) if want else None for x, want in zip((queries, table, bias), wanted)]
    C.catalogue_cross_entropy(
        tuple(map(address, pointers)),
        tuple(map(address, (losses, *grads))),
        *(rows, *table.shape),
        1.0 / rows,
        isa,
        torch.get_num_threads(),
    )
    grads = [losses.new_empty(0) if grad is None else grad for grad in grads]
    narrow = [grad[:, :dim].contiguous() if grad.dim() == 2 else grad for grad in grads]
    return losses.mean(dtype=torch.float64).to(losses.dtype), *narrow


def forward_fake(queries, table, bias, target, log_expected, seen, first, older, offsets, users, wanted) -> Results:
    """Output of forward, unfilled."""
    grads = [x.new_empty(x.shape if want else (0,)) for x, want in zip((queries, table, bias), wanted)]
    return queries.new_empty(()), *grads


def _nothing(queries, table, bias, wanted) -> Results:
    """For no rows."""
    return queries.new_zeros(()), *(
        x.new_zeros(x.shape if want else 0) for x, want in zip((queries, table, bias), wanted)
    )


def _check(queries, table, bias, target, log_expected, *indices_and_wanted) -> None:
    for x in (queries, table, bias, log_expected):
        if x is not None and x.dtype != torch.float32:
            raise TypeError(f"the kernel of catalogue_cross_entropy takes float32, got {str(x.dtype)[6:]}")
    check_int64(target, *indices_and_wanted[:-1])


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *inputs, wanted = args
        wanted = [asked or needed for asked, needed in zip(wanted, ctx.needs_input_grad)]
        loss, *grads = below_autograd(OP, *inputs, wanted)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*grads)
        return loss, *grads

    @staticmethod
    @once_only
    def backward(ctx, saved, grad_loss, *_):
        return *(grad_loss * g if want else None for g, want in zip(saved, ctx.needs_input_grad)), *(None,) * 8


_HISTORIES = "Tensor? seen, Tensor? first, Tensor? older, Tensor? offsets, Tensor? users"

define(
    "catalogue_cross_entropy",
    f"(Tensor queries, Tensor table, Tensor bias, Tensor target, Tensor? log_expected, {_HISTORIES}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_fake,
    _CatalogueCrossEntropy,
    check=_check,
)
OP = torch.ops.pcl_ext.catalogue_cross_entropy.default
