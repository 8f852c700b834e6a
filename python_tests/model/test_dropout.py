"""Dropout of the backbone: which share falls, what is kept, its gradient, and the generator it draws from."""

import pytest
import torch

from pcl_ext.model.dropout import Dropout

SIGMAS = 5


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_share_p_falls_in_every_lane_and_the_rest_is_scaled(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4000, 63, dtype=dtype)
    y = Dropout(p)(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    kept = y[y != 0]
    torch.testing.assert_close(
        kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )
    for lane in range(4):
        fell = (y.flatten()[lane::4] == 0).double()
        assert abs(fell.mean() - p) < SIGMAS * (p * (1 - p) / len(fell)) ** 0.5 + 2**-17


def test_neighbours_fall_independently():
    torch.manual_seed(0)
    fell = (Dropout(0.5)(torch.ones(200_000)) == 0).double()
    for step in (1, 2, 3, 4, 8):
        both = (fell[:-step] * fell[step:]).mean()
        assert abs(both - 0.25) < SIGMAS * (0.25 * 0.75 / len(fell)) ** 0.5


def test_the_gradient_has_the_same_mask():
    torch.manual_seed(0)
    x = torch.randn(300, 7, requires_grad=True)
    y = Dropout(0.3)(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_it_follows_the_seed_of_torch():
    x, dropout = torch.ones(100, 9), Dropout(0.4)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.99999999])
def test_the_ends(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(1000, 3))
    assert y.isfinite().all()
    assert torch.equal(y, torch.ones(1000, 3)) == (p < 0.5)


def test_nothing_falls_in_evaluation_mode_and_of_nothing():
    x = torch.randn(50, 4)
    assert Dropout(0.9).eval()(x) is x
    assert Dropout(0.9)(x[:0]).shape == (0, 4)


def test_another_default_device_is_no_matter():
    x = torch.ones(300, 7)
    torch.manual_seed(0)
    want = Dropout(0.3)(x)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(Dropout(0.3)(x), want)
