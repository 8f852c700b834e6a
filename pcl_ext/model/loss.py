"""The loss of each kind of task, and what the targets that are learned may be."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from pcl_ext.model.catalogue import SEEN_SCORE
from pcl_ext.task import TaskSpec

_CACHED = 1 << 15  # columns summed at a time where no gradient is taken


def task_loss(spec: TaskSpec, output: Tensor, target: Tensor, target_row: Tensor) -> Tensor:
    """Mean loss over targets, in float32, or in float64 where the output is of it.

    output [b, C] (items, classes) or [b] (binary logits, regression values); target [m]: the column, the class, 0 / 1
    or the value; target_row [m]: the row of the output each belongs to, both of any integer dtype, values and flags
    also of a floating one. Without targets it is 0. Raises TypeError or ValueError for an output or targets of another
    shape; on the CPU, outside of compiled code and transforms such as vmap, also for columns, classes and flags that do
    not exist, values that are not finite, and for items to learn that their history holds. On CUDA nobody looks: a
    column or class below 0 makes the loss NaN, as a value that is NaN does.
    """
    _check_output(spec, output)
    _check_targets(spec, output, target, target_row)
    if not len(target):
        return wide(output[:0]).sum()
    target_row = target_row.long()
    if spec.kind == "items":
        own = output[target_row, target.long().clamp_min(0)]
        _check_unseen(spec, output, own, target, target_row)
        losses = _logsumexp(output)[target_row] - wide(own)
        return losses.masked_fill(target < 0, torch.nan).mean()
    if spec.kind == "classes":
        loss = F.cross_entropy(wide(output[target_row]), target.long().clamp_min(0))
        return loss.masked_fill((target < 0).any(), torch.nan)  # -100 would be left out in silence
    output = wide(output[target_row])
    if spec.kind == "binary":
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))
    return F.mse_loss(output, target.to(output.dtype))


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is of it: what losses are summed in."""
    return x if x.dtype == torch.float64 else x.float()


def _check_unseen(spec: TaskSpec, output: Tensor, own: Tensor, target: Tensor, target_row: Tensor) -> None:
    """Targets to learn, with scores own [m], are none of those that `Catalogue.rank_last` has put last."""
    if spec.repeats or not output.requires_grad or not _can_be_read(output):
        return
    last = max(SEEN_SCORE, torch.finfo(output.dtype).min) / 2  # half of it: bfloat16 rounds
    # a score of -inf is a mask of somebody else's
    if len(seen := ((own <= last) & own.isfinite() & (target >= 0)).nonzero()):
        raise ValueError(
            f"a target of {spec.name!r}, in row {int(target_row[seen[0, 0]])} of the output, is an item that its "
            f"history holds already, as are {len(seen)} of {len(own)} targets; these rank last: leave them out, or say "
            "TaskSpec(..., repeats=True)"
        )


def _can_be_read(tensor: Tensor) -> bool:
    """Whether its values may be looked at: CUDA would have to be waited for, traces and transforms refuse."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and peek_interpreter_stack() is None


def _logsumexp(output: Tensor) -> Tensor:
    """[b, C] -> [b], as `wide`. More columns than a cache holds are summed in parts; a gradient takes them at once."""
    if output.requires_grad or output.shape[1] <= _CACHED:
        return torch.logsumexp(wide(output), dim=1)
    return torch.stack([torch.logsumexp(wide(part), 1) for part in output.split(_CACHED, 1)]).logsumexp(0)


def _check_output(spec: TaskSpec, output: Tensor) -> None:
    if not isinstance(spec, TaskSpec):
        hint = "; task.spec is one" if isinstance(spec, nn.Module) else ""
        raise TypeError(f"spec must be a TaskSpec, got {type(spec).__name__}{hint}")
    if not isinstance(output, Tensor):
        hint = "; of a mixed batch take one task's: rows, output = outputs[name]" if isinstance(output, dict) else ""
        raise TypeError(f"output of {spec.name!r} must be a Tensor, got {type(output).__name__}{hint}")
    columns = {"items": "C", "classes": str(spec.num_classes)}.get(spec.kind)
    wrong = spec.kind == "classes" and output.shape[1:] != (spec.num_classes,)
    if wrong or output.dim() != (1 if columns is None else 2):
        wanted = "[b]" if columns is None else f"[b, {columns}]"
        raise ValueError(f"output of {spec.name!r} ({spec.kind}) must be {wanted}, got {list(output.shape)}")


def _check_targets(spec: TaskSpec, output: Tensor, target: Tensor, target_row: Tensor) -> None:
    for name, value in (("target", target), ("target_row", target_row)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor [m], got {type(value).__name__}")
    if target.dim() != 1 or target.shape != target_row.shape:
        shapes = f"{list(target.shape)} and {list(target_row.shape)}"
        raise ValueError(f"target and target_row must both be [m], got {shapes}")
    if spec.kind in ("items", "classes") and target.is_floating_point():
        raise TypeError(f"targets of {spec.name!r} must be integers, got {target.dtype}")
    if target_row.is_floating_point() or target_row.dtype == torch.bool:
        raise TypeError(f"target_row must be integers, got {target_row.dtype}")
    if not _can_be_read(target) or not len(target):
        return
    low, high = (int(x) for x in target_row.aminmax())
    if not 0 <= low <= high < len(output):
        raise ValueError(f"target_row must be in 0..{len(output) - 1}, the rows of the output, got {low} to {high}")
    low, high = (x.item() for x in target.aminmax())
    if spec.kind == "regression":
        if not math.isfinite(low) or not math.isfinite(high):
            place = int((~target.isfinite()).nonzero()[0])
            got = f"{float(target[place])} in place {place}"
            raise ValueError(f"targets of {spec.name!r} must be finite, got {got}; leave such rows out")
        return
    top = 1 if spec.kind == "binary" else output.shape[1] - 1
    if not 0 <= low <= high <= top:
        what, hint = "in", ""
        if spec.kind == "items":
            what, hint = "columns of the output, in", "; task.columns(item_ids) gives them"
        raise ValueError(f"targets of {spec.name!r} must be {what} 0..{top}, got {low:g} to {high:g}{hint}")


def check_fit(spec: TaskSpec, features: Tensor, target: Tensor, *, width: int, columns: int) -> None:
    """Raise where `Task.fit_head` cannot start from features [n, width] and targets [m], given a head of so many
    columns."""
    name = spec.name
    for what, values, rest in (("features", features, [width]), ("targets", target, [])):
        if not isinstance(values, Tensor):
            raise TypeError(f"{what} of task {name!r} must be a Tensor, got {type(values).__name__}")
        if values.dim() == 0 or list(values.shape[1:]) != rest:
            wanted = ", ".join(map(str, ["n", *rest]))
            raise ValueError(f"{what} of task {name!r} must be [{wanted}], got {list(values.shape)}")
    if not len(features) or not len(target):
        raise ValueError(
            f"task {name!r} must be fitted to at least one history and one target, got {len(features)} and "
            f"{len(target)}; leave fit_head out to start at zero"
        )
    for what, values in (("features", features), ("targets", target)):
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"{what} of task {name!r} must be finite, got NaN or infinity; leave such rows out")
    low, high = (float(value) for value in target.aminmax())
    top = 1 if spec.kind == "binary" else columns - 1
    if spec.kind != "regression" and not 0 <= low <= high <= top:
        raise ValueError(f"targets of task {name!r} must be in 0..{top}, got {low:g} to {high:g}")
