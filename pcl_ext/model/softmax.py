"""Cross-entropy over a catalogue without ever holding [rows, items]."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 21  # scores held at a time: 8 MB


def catalogue_cross_entropy(
    queries: Tensor, table: Tensor, bias: Tensor, target: Tensor, seen: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean of logsumexp(s) - s[target] with scores s = queries @ table.T + bias, chunk by chunk of rows.

    queries [T, D], table [C, D], bias [C], target [T] int64 columns -> scalar. Gradients of queries, table and bias
    are taken on the way forward, so nothing of size T x C outlives its chunk; 0 for T = 0. Float32 accumulation; under
    autocast the products are in its dtype.

    seen  (columns [T] int64, first [T] int64): row r does not choose among columns[first[r] : r + 1], what its history
          holds already; its target is not one of them
    """
    return _CatalogueCrossEntropy.apply(queries, table, bias, target, *(seen or (None, None)))


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, table: Tensor, bias: Tensor, target: Tensor, columns, first) -> Tensor:
        autocast = torch.is_autocast_enabled(queries.device.type)
        dtype = torch.get_autocast_dtype(queries.device.type) if autocast else queries.dtype
        with torch.autocast(queries.device.type, enabled=False):
            seen = None if columns is None else (columns, first)
            loss, grads = _loss_and_gradients(queries.to(dtype), table.to(dtype), bias, target, seen)
        ctx.save_for_backward(*(grad.to(like.dtype) for grad, like in zip(grads, (queries, table, bias))))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        return *(grad_loss * grad for grad in ctx.saved_tensors), None, None, None


def _loss_and_gradients(queries: Tensor, table: Tensor, bias: Tensor, target: Tensor, seen):
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=queries.device)
    grad_queries = torch.empty(queries.shape, dtype=wide, device=queries.device)
    grad_table = torch.zeros(table.shape, dtype=wide, device=queries.device)
    grad_bias = torch.zeros(bias.shape, dtype=wide, device=queries.device)
    chunk = max(1, _CHUNK // len(table))
    for start in range(0, len(queries), chunk):
        part, columns = slice(start, start + chunk), target[start : start + chunk, None]
        scores = (queries[part] @ table.T).to(wide).add_(bias)
        if seen is not None:
            scores[_seen_pairs(*seen, start, len(scores))] = -torch.inf
        scores -= torch.logsumexp(scores, 1, keepdim=True)
        total -= scores.gather(1, columns).sum()
        scores.exp_().scatter_add_(1, columns, scores.new_full(columns.shape, -1.0))
        grad_bias += scores.sum(0)
        scores = scores.to(queries.dtype)
        grad_queries[part] = scores @ table
        grad_table += scores.T @ queries[part]
    share = 1.0 / max(len(queries), 1)
    return total * share, tuple(grad.mul_(share) for grad in (grad_queries, grad_table, grad_bias))


def _seen_pairs(columns: Tensor, first: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(row, column) of everything that rows start .. start + count have seen, rows counted from start."""
    rows = torch.arange(start, start + count, device=first.device)
    lengths = rows + 1 - first[rows]
    row = torch.repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    place = torch.arange(row.numel(), device=row.device) - (ends - lengths)[row] + first[rows][row]
    return row, columns[place]
