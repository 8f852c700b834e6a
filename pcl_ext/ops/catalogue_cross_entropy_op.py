"""pcl_ext::catalogue_cross_entropy: schema, kernel, fake, autograd. Its gradients come with the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_ext.ops._check import check_offset_values, check_range, check_shape
from pcl_ext.ops._native import BEST_ISA, C, address, below_autograd, check_int64, define, once_only

_WIDTH = 16  # the kernel reads whole vectors of this many numbers

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def check_values(items: int, target, seen, first, older, offsets, users) -> None:
    """The rules on values, for a catalogue of so many items. CPU only."""
    check_range("target", target, 0, items - 1)
    if seen is not None:
        check_range("columns of seen", seen, -1, items - 1)
        check_range("first of seen", first, 0, len(first) - 1)
        late = (first > torch.arange(len(first), device=first.device)).nonzero()
        if len(late):
            row = int(late[0])
            raise ValueError(f"first of seen must be at most the row's own number, got {int(first[row])} in row {row}")
    if older is not None:
        check_range("columns of older", older, -1, items - 1)
        if not len(offsets):
            raise ValueError("offsets of older must hold at least one entry, the 0 it starts with, got none")
        check_offset_values("offsets of older", offsets, len(older), "the number of its columns")
        check_range("users of older", users, 0, len(offsets) - 2)
        if bool((users[1:] < users[:-1]).any()):
            raise ValueError("users of older must never decrease")


def _whole_vectors(x: Tensor) -> Tensor:
    """x [n, D], contiguous, with zeros after it up to a multiple of the width."""
    missing = -x.shape[1] % _WIDTH
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def forward(
    queries, table, bias, target, log_expected, seen, first, older, offsets, users, wanted, *, isa=BEST_ISA
) -> Results:
    """loss (), and its gradients of queries, table and bias, each empty where not wanted."""
    # here, not in the public function: compiled and exported programs come straight to the kernel
    check_values(len(table), target, seen, first, older, offsets, users)
    rows, dim = queries.shape
    if rows == 0:
        return _nothing(queries, table, bias, wanted)
    queries, table = _whole_vectors(queries), _whole_vectors(table)
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


def _check(queries, table, bias, target, log_expected, seen, first, older, offsets, users, wanted) -> None:
    for x in (queries, table, bias, log_expected):
        if x is not None and x.dtype != torch.float32:
            raise TypeError(f"the kernel of catalogue_cross_entropy takes float32, got {str(x.dtype)[6:]}")
    check_int64(target, seen, first, older, offsets, users)
    (rows, dim), items = queries.shape, table.shape[0]
    check_shape("table", table, (items, dim), "[C, D]")
    for name, value in {"bias": bias, "log_expected": log_expected}.items():
        if value is not None:
            check_shape(name, value, (items,), "[C]")
    for name, value in {"target": target, "seen": seen, "first": first, "users": users}.items():
        if value is not None:
            check_shape(name, value, (rows,), "[T]")


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
