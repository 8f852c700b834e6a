"""catalogue_cross_entropy: the loss of a softmax over a catalogue, without ever holding [rows, items]."""

import torch
from torch import Tensor

from pcl_ext.ops import catalogue_blocks, catalogue_cross_entropy_op, reference
from pcl_ext.ops._check import (
    FLOATS,
    check_like,
    check_offset_values,
    check_range,
    check_shape,
    check_tensor,
    reads_values,
)
from pcl_ext.ops._native import use_fused
from pcl_ext.ops.linear_op import PAYS

_MOST_NUMBERS = 1 << 23  # of a table: the kernel holds on to as much memory, 32 MB, and 16 MB of scores


def catalogue_cross_entropy(
    queries: Tensor,
    table: Tensor,
    bias: Tensor,
    target: Tensor,
    seen: tuple[Tensor, Tensor] | None = None,
    log_expected: Tensor | None = None,
    older: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Mean of logsumexp(s) - s[target] with scores s = queries @ table.T + bias, a block of rows at a time.

    queries [T, D], table [C, D], bias [C], target [T] int64 columns -> scalar; 0 for T = 0. The gradients that are
    wanted of queries, table and bias are taken on the way forward, so nothing of size T x C outlives its block.
    Float32 accumulation; under autocast the products are in its dtype. Float32 on the CPU has a kernel, others take
    PyTorch's operations block by block. Raises TypeError or ValueError naming what is wrong; values are looked at on
    the CPU alone.

    seen  (columns [T] int64, first [T] int64): row r does not choose among columns[first[r] : r + 1], what its history
          holds already; its target is not one of them. A column of -1 is none
    log_expected  [C], where the columns are a sample: log of how often each was expected to be drawn, by how often it
          was (logQ correction; Bengio and Senecal, 2008). It is taken off every score but the target's, which is there
          for certain; infinity for a column that is there as a target alone
    older  (columns [O], offsets [B + 1], users [T]), int64, users never decreasing: nor do the rows of user u choose
          among columns[offsets[u] : offsets[u + 1]], what was seen before the first of them
    """
    _check(queries, table, bias, target, seen, log_expected, older)
    inputs = (queries, table, bias, target, seen, log_expected, older)
    if impl == "reference":
        return reference.catalogue_cross_entropy(*inputs)
    fused = use_fused(impl, queries, cpu=(torch.float32,))
    if fused and (impl == "fused" or _pays(queries, table, bias, log_expected)):
        histories = (*(seen or (None,) * 2), *(older or (None,) * 3))
        return catalogue_cross_entropy_op.OP(queries, table, bias, target, log_expected, *histories, (False,) * 3)[0]
    return catalogue_blocks.catalogue_cross_entropy(*inputs)


def _pays(queries, table, bias, log_expected) -> bool:
    """Whether the kernel may be taken where nobody asks for it."""
    floats = (queries, table, bias) if log_expected is None else (queries, table, bias, log_expected)
    alike = all(x.dtype == torch.float32 for x in floats)
    return alike and PAYS and table.numel() <= _MOST_NUMBERS and not torch.is_autocast_enabled("cpu")


def _check(queries, table, bias, target, seen, log_expected, older) -> None:
    check_tensor("queries", queries, 2, FLOATS)
    check_tensor("table", table, 2, FLOATS)
    check_shape("table", table, (len(table), queries.shape[1]), "[C, D]")
    columns = {"bias": bias} | ({} if log_expected is None else {"log_expected": log_expected})
    for name, value in columns.items():
        check_tensor(name, value, 1, FLOATS)
        check_shape(name, value, (len(table),), "[C]")
    rows = {"target": target}
    if seen is not None:
        rows |= {"the columns of seen": seen[0], "first of seen": seen[1]}
    if older is not None:
        rows["users of older"] = older[2]
        for name, value in {"the columns of older": older[0], "offsets of older": older[1]}.items():
            check_tensor(name, value, 1, (torch.int64,))
            columns[name] = value
    for name, value in rows.items():
        check_tensor(name, value, 1, (torch.int64,))
        check_shape(name, value, (len(queries),), "[T]")
    for name, value in {"table": table, **columns, **rows}.items():
        check_like(name, value, "queries", queries, dtype=False)
    if reads_values(queries):
        _check_values(len(table), target, seen, older)


def _check_values(items: int, target, seen, older) -> None:
    check_range("target", target, 0, items - 1)
    if seen is not None:
        columns, first = seen
        check_range("the columns of seen", columns, -1, items - 1)
        check_range("first of seen", first, 0, len(first) - 1)
        late = (first > torch.arange(len(first))).nonzero()
        if len(late):
            row = int(late[0])
            raise ValueError(f"first of seen must be at most the row's own number, got {int(first[row])} in row {row}")
    if older is not None:
        columns, offsets, users = older
        check_range("the columns of older", columns, -1, items - 1)
        if not len(offsets):
            raise ValueError("offsets of older must hold at least one entry, the 0 it starts with, got none")
        check_offset_values("offsets of older", offsets, len(columns), "the number of its columns")
        check_range("users of older", users, 0, len(offsets) - 2)
        if bool((users[1:] < users[:-1]).any()):
            raise ValueError("users of older must never decrease")
