"""Reduced-rank ridge regression between two sparse matrices: the closed-form start of an items task's memory.

With X [n, R] what each user's item memory reads, Y [n, C] who has which target and m its column means, the regression
is W = (X'X + strength)^-1 X'(Y - m). Neither W nor a matrix of R x R or n x n is ever made: W is only applied to a few
columns at a time, by conjugate gradients with a diagonal preconditioner, and its best approximation of a given rank is
found from a random sketch with one power iteration (Halko, Martinsson and Tropp, 2011).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_OVERSAMPLE, _TOLERANCE, _STEPS = 16, 1e-3, 200


def csr(index: Tensor, offsets: Tensor, weights: Tensor, columns: int) -> Tensor:
    """Rows packed as index [t], offsets [n + 1], weights [t] -> sparse [n, columns] float64; equal places add up."""
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(index))
    return _compressed(torch.stack([rows, index.long()]), weights.double(), (len(offsets) - 1, columns))


def _transposed(matrix: Tensor) -> Tensor:
    rows = torch.repeat_interleave(matrix.crow_indices().diff())
    return _compressed(torch.stack([matrix.col_indices(), rows]), matrix.values(), tuple(matrix.shape[::-1]))


def _compressed(places: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch warns of its sparse layouts
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce().to_sparse_csr()


class Ridge:
    """W of the module's docstring, for x [n, R] and y [n, C] sparse CSR."""

    def __init__(self, x: Tensor, y: Tensor, strength: float):
        self.x, self.x_t, self.y, self.y_t = x, _transposed(x), y, _transposed(y)
        self.strength = strength
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        self.means = (self.y_t @ ones)[:, 0] / max(1, len(x))
        squares = torch.zeros(x.shape[1], dtype=x.dtype).index_add_(0, x.col_indices(), x.values() ** 2)
        self.diagonal = squares[:, None] + strength

    def apply(self, columns: Tensor) -> Tensor:
        """W columns: [C, m] -> [R, m]."""
        return self.solve(self.x_t @ (self.y @ columns - self.means @ columns))

    def apply_t(self, columns: Tensor) -> Tensor:
        """W' columns: [R, m] -> [C, m]."""
        read = self.x @ self.solve(columns)
        return self.y_t @ read - self.means[:, None] * read.sum(0)

    def solve(self, right: Tensor) -> Tensor:
        """(X'X + strength)^-1 right: [R, m] -> [R, m], each column by its own conjugate gradients."""
        found, rest = torch.zeros_like(right), right.clone()
        scaled = rest / self.diagonal
        direction, product = scaled.clone(), (rest * scaled).sum(0)
        goal = product * _TOLERANCE**2
        for _ in range(_STEPS):
            if bool((product <= goal).all()):
                break
            image = self.x_t @ (self.x @ direction) + self.strength * direction
            step = _share(product, (direction * image).sum(0))
            found += step * direction
            rest -= step * image
            scaled = rest / self.diagonal
            before, product = product, (rest * scaled).sum(0)
            direction = scaled + _share(product, before) * direction
        return found

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """left [R, rank], right [rank, C]: left @ right is nearly W's best approximation of that rank; each takes the
        root of its singular values. A rank that W does not have is filled with zeros."""
        width = min(rank + _OVERSAMPLE, *self.x.shape, self.y.shape[1])
        sketch = torch.randn(self.y.shape[1], width, dtype=self.x.dtype)
        basis = torch.linalg.qr(self.apply(sketch)).Q
        basis = torch.linalg.qr(self.apply(self.apply_t(basis))).Q
        u, s, vh = torch.linalg.svd(self.apply_t(basis).T, full_matrices=False)
        left, right = basis @ (u * s.sqrt()), s.sqrt()[:, None] * vh
        missing = max(0, rank - len(s))
        left = torch.nn.functional.pad(left[:, :rank], (0, missing))
        return left, torch.nn.functional.pad(right[:rank], (0, 0, 0, missing))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where a column is solved exactly."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0)
