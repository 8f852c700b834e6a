"""The reduced-rank ridge regression against a dense one in float64."""

import torch

from pcl_ext.model.ridge import Ridge, csr


def sparse(n, columns, each, seed):
    """Some columns far more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    index = (torch.rand(n * each, generator=generator) ** 3 * columns).long()
    return csr(index, torch.arange(n + 1) * each, torch.full((n * each,), each**-0.5), columns)


def dense(x, y, strength):
    x, y = x.to_dense(), y.to_dense()
    return torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]).double(), x.T @ (y - y.mean(0)))


def test_rows_are_packed_and_equal_places_add_up():
    got = csr(torch.tensor([2, 0, 2, 1]), torch.tensor([0, 3, 3, 4]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 3).to_dense()
    assert got.tolist() == [[2, 0, 4], [0, 0, 0], [0, 4, 0]]


def test_the_regression_is_that_of_the_dense_formula():
    x, y = sparse(200, 80, 10, 0), sparse(200, 30, 4, 1)
    got, want = Ridge(x, y, 3.0), dense(x, y, 3.0)
    assert (got.apply(torch.eye(30).double()) - want).norm() < 2e-3 * want.norm()
    assert (got.apply_t(torch.eye(80).double()) - want.T).norm() < 2e-3 * want.norm()


def test_its_factors_are_nearly_the_best_of_their_rank():
    torch.manual_seed(0)
    x, y = sparse(400, 300, 10, 0), sparse(400, 200, 4, 1)
    left, right = Ridge(x, y, 3.0).factors(40)
    want = dense(x, y, 3.0)
    u, s, vh = torch.linalg.svd(want, full_matrices=False)
    best = (want - (u[:, :40] * s[:40]) @ vh[:40]).norm()
    assert best < (want - left @ right).norm() < 1.05 * best
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_a_rank_that_is_not_there_is_filled_with_zeros():
    torch.manual_seed(0)
    x, y = sparse(50, 20, 5, 0), sparse(50, 7, 2, 1)
    left, right = Ridge(x, y, 1.0).factors(16)
    assert left.shape == (20, 16)
    assert right.shape == (16, 7)
    want = dense(x, y, 1.0)
    assert (left @ right - want).norm() < 5e-3 * want.norm()
