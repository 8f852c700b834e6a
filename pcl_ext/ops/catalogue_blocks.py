"""catalogue_cross_entropy on PyTorch's operations, a block of scores at a time: where no kernel fits."""

from __future__ import annotations

import torch
from torch import Tensor

from pcl_ext.ops._native import once_only

_CHUNK = 1 << 21  # scores held at a time: 8 MB, which a processor's cache holds
_ELSEWHERE = 1 << 26  # on other devices, which do much at once: 256 MB
_FEW_ROWS = 64  # fewer at a time, and passing over the table costs more than computing scores twice


def catalogue_cross_entropy(queries, table, bias, target, seen, log_expected, older) -> Tensor:
    """See ops.catalogue_cross_entropy."""
    return _CatalogueCrossEntropy.apply(queries, table, bias, target, seen, log_expected, older)


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, table, bias, target, seen, log_expected, older):
        kind, dtype = queries.device.type, queries.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            given = (bias, target, seen, log_expected, older)
            loss, grads = _in_blocks(queries.to(dtype), table.to(dtype), *given, ctx.needs_input_grad)
        # as wide as they were added up: in float16 a mean's gradients are 0 before the loss's scale meets them
        ctx.save_for_backward(*grads)
        ctx.dtypes = queries.dtype, table.dtype, bias.dtype
        return loss

    @staticmethod
    @once_only
    def backward(ctx, saved, grad_loss: Tensor):
        asked = zip(saved, ctx.dtypes, ctx.needs_input_grad)
        return *((grad_loss * g).to(dtype) if want else None for g, dtype, want in asked), *(None,) * 4


def _in_blocks(queries: Tensor, table: Tensor, bias: Tensor, target: Tensor, seen, log_expected, older, wanted):
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=queries.device)
    shapes = [x.shape if want else (0,) for x, want in zip((queries, table, bias), wanted)]
    grads = [torch.zeros(shape, dtype=wide, device=queries.device) for shape in shapes]
    rows, columns = _block_shape(len(table), _CHUNK if queries.is_cpu else _ELSEWHERE)
    for start in range(0, len(queries), rows):
        block = _Block(queries[start : start + rows], table, bias, target[start : start + rows], log_expected, wide)
        if seen is not None:
            block.seen = _seen_pairs(*seen, start, len(block.target))
        if older is not None:
            block.older = _Older(*older, start, len(block.target))
        total -= block.add_gradients(grads[0][start : start + rows], grads[1], grads[2], columns)
    share = 1.0 / max(len(queries), 1)
    return total * share, [grad.mul_(share) for grad in grads]


def _block_shape(items: int, most: int) -> tuple[int, int]:
    """Rows and columns of so many scores at most: all columns, or where those leave few rows some of both."""
    if most >= _FEW_ROWS * items:
        return most // max(items, 1), items
    return 16 * _FEW_ROWS, max(1, most // (16 * _FEW_ROWS))


class _Block:
    """Some rows, and their scores over any run of columns. seen: (row, column) of what does not take part; older: nor
    does that."""

    def __init__(self, queries: Tensor, table: Tensor, bias: Tensor, target: Tensor, log_expected, wide: torch.dtype):
        self.queries, self.table, self.bias, self.target = queries, table, bias, target
        self.log_expected, self.wide, self.seen, self.older = log_expected, wide, None, None

    def scores(self, first: int, last: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[rows, last - first], and where the targets among these columns are."""
        row = ((self.target >= first) & (self.target < last)).nonzero()[:, 0]
        at = row, self.target[row] - first
        scores = (self.queries @ self.table[first:last].T).to(self.wide).add_(self.bias[first:last])
        if self.log_expected is not None:
            own = scores[at]
            scores -= self.log_expected[first:last]
            scores[at] = own
        if self.seen is not None:
            row, column = self.seen
            inside = (column >= first) & (column < last)
            scores[row[inside], column[inside] - first] = -torch.inf
        if self.older is not None:
            self.older.hide(scores, first, last)
        return scores, at

    def add_gradients(self, grad_queries: Tensor, grad_table: Tensor, grad_bias: Tensor, columns: int) -> Tensor:
        """The sum of the rows' log probabilities of their targets; adds what it gives the gradients of minus that.

        A gradient without rows is not wanted.
        """
        total, runs = 0.0, [(i, min(i + columns, len(self.table))) for i in range(0, len(self.table), columns)]
        # more than one run: scores are computed twice, the first time to be summed
        normal = None
        if len(runs) > 1:
            normal = torch.stack([torch.logsumexp(self.scores(*run)[0], 1) for run in runs]).logsumexp(0)
        for first, last in runs:
            scores, at = self.scores(first, last)
            scores -= scores.amax(1, keepdim=True) if normal is None else normal[:, None]
            total = total + scores[at].sum()
            scores.exp_()
            if normal is None:
                mass = scores.sum(1, keepdim=True)
                total = total - mass.log().sum()
                scores /= mass
            scores[at] -= 1.0
            if len(grad_bias):
                grad_bias[first:last] += scores.sum(0)
            scores = scores.to(self.queries.dtype)
            if len(grad_queries):
                grad_queries += scores @ self.table[first:last]
            if len(grad_table):
                grad_table[first:last] += scores.T @ self.queries
        return total


class _Older:
    """What the users of some rows, start .. start + count, have seen before these.

    A user's rows are consecutive, and who has seen anything before has a whole window of them: such users are few.
    """

    def __init__(self, columns: Tensor, offsets: Tensor, users: Tensor, start: int, count: int):
        users, counts = torch.unique_consecutive(users[start : start + count], return_counts=True)
        ends = counts.cumsum(0)
        self.runs = []
        bounds = torch.stack([ends - counts, ends, offsets[users], offsets[users + 1]], 1)
        for row, last_row, column, last_column in bounds[bounds[:, 2] < bounds[:, 3]].tolist():
            self.runs.append((row, last_row, columns[column:last_column]))

    def hide(self, scores: Tensor, first: int, last: int) -> None:
        """Take what was seen out of the scores [rows, last - first] of these columns."""
        for row, last_row, columns in self.runs:
            inside = columns[(columns >= first) & (columns < last)]
            scores[row:last_row].index_fill_(1, inside - first, -torch.inf)


def _seen_pairs(columns: Tensor, first: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(row, column) of everything that rows start .. start + count have seen, rows counted from start."""
    rows = torch.arange(start, start + count, device=first.device)
    lengths = rows + 1 - first[rows]
    row = torch.repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    place = torch.arange(row.numel(), device=row.device) - (ends - lengths)[row] + first[rows][row]
    column = columns[place]
    return row[column >= 0], column[column >= 0]
