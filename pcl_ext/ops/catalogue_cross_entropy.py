"""catalogue_cross_entropy: the loss of a softmax over a catalogue, without ever holding [rows, items]."""

import torch
from torch import Tensor

from pcl_ext.ops import catalogue_blocks, catalogue_cross_entropy_op, reference
from pcl_ext.ops._check import FLOATS, check_like, check_shape, check_tensor, reads_values
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
    Float32 accumulation; under autocast the products are in its dtype, but those of float64 and of impl="fused" in
    their own. Float32 on the CPU has a kernel, others take PyTorch's operations block by block. Raises TypeError or
    ValueError naming what is wrong; values are looked at on the CPU alone.

    seen  (columns [T] int64, first [T] int64): row r does not choose among columns[first[r] : r + 1], what its history
          holds already; its target is not one of them. A column of -1 is none
    log_expected  [C], where the columns are a sample: log of how often each was expected to be drawn, by how often it
          was (logQ correction; Bengio and Senecal, 2008). It is taken off every score but the target's, which is there
          for certain; infinity for a column that is there as a target alone. It gets no gradient
    older  (columns [O], offsets [B + 1], users [T]), int64, users never decreasing: nor do the rows of user u choose
          among columns[offsets[u] : offsets[u + 1]], what was seen before the first of them
    """
    _check(queries, table, bias, target, seen, log_expected, older)
    if not torch.is_grad_enabled():  # gradients are taken on the way forward: none is wanted now
        queries, table, bias = queries.detach(), table.detach(), bias.detach()
    inputs = (queries, table, bias, target, seen, log_expected, older)
    if impl == "reference":
        _check_values(*inputs)
        return reference.catalogue_cross_entropy(*inputs)
    _check_constant(log_expected)
    fused = use_fused(impl, queries, cpu=(torch.float32,))
    if fused and (impl == "fused" or _pays(queries, table, bias, log_expected)):
        given = (queries, table, bias, target, log_expected, *_histories(seen, older))
        return catalogue_cross_entropy_op.OP(*given, (False,) * 3)[0]
    _check_values(*inputs)
    return catalogue_blocks.catalogue_cross_entropy(*inputs)


def _pays(queries, table, bias, log_expected) -> bool:
    """Whether the kernel may be taken where nobody asks for it."""
    floats = (queries, table, bias) if log_expected is None else (queries, table, bias, log_expected)
    alike = all(x.dtype == torch.float32 for x in floats)
    return alike and PAYS and table.numel() <= _MOST_NUMBERS and not torch.is_autocast_enabled("cpu")


def _check(queries, table, bias, target, seen, log_expected, older) -> None:
    check_tensor("queries", queries, 2, FLOATS)
    check_tensor("table", table, 2, FLOATS)
    # .shape[0]: len() would fix the size in an exported program
    items = table.shape[0]
    check_shape("table", table, (items, queries.shape[1]), "[C, D]")
    columns = {"bias": bias} | ({} if log_expected is None else {"log_expected": log_expected})
    for name, value in columns.items():
        check_tensor(name, value, 1, FLOATS)
        check_shape(name, value, (items,), "[C]")
    rows = {"target": target}
    if seen is not None:
        rows |= _parts("seen", seen, "columns", "first")
    if older is not None:
        held = _parts("older", older, "columns", "offsets", "users")
        rows["users of older"] = held.pop("users of older")
        for name, value in held.items():
            check_tensor(name, value, 1, (torch.int64,))
        columns |= held
    for name, value in rows.items():
        check_tensor(name, value, 1, (torch.int64,))
        check_shape(name, value, (queries.shape[0],), "[T]")
    for name, value in {"table": table, **columns, **rows}.items():
        check_like(name, value, "queries", queries, dtype=False)


def _parts(name: str, value, *parts: str) -> dict[str, Tensor]:
    """The tensors of seen or older by name."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple ({', '.join(parts)}), got {type(value).__name__}")
    if len(value) != len(parts):
        raise ValueError(f"{name} must be a tuple ({', '.join(parts)}), got {len(value)} entries")
    return {f"{part} of {name}": x for part, x in zip(parts, value)}


def _check_constant(log_expected) -> None:
    if log_expected is not None and log_expected.requires_grad and torch.is_grad_enabled():
        raise ValueError("log_expected asks for a gradient, and gets none: detach it, or take impl='reference'")


def _check_values(queries, table, bias, target, seen, log_expected, older) -> None:
    """The kernel looks at values itself; PyTorch's operations do not."""
    if reads_values(queries):
        catalogue_cross_entropy_op.check_values(len(table), target, *_histories(seen, older))


def _histories(seen, older) -> tuple:
    """Their five tensors, None where there are none."""
    return *(seen or (None,) * 2), *(older or (None,) * 3)
