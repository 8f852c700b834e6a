"""catalogue_cross_entropy in blocks of PyTorch's operations, rows alone or rows and columns, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from pcl_ext.ops import catalogue_blocks
from pcl_ext.ops import catalogue_cross_entropy as loss_of


@pytest.fixture(autouse=True, params=[1, 64], ids=["rows", "rows and columns"])
def _few_rows(request, monkeypatch):
    """Chunks of a few rows over all columns, or of some of both."""
    monkeypatch.setattr(catalogue_blocks, "_FEW_ROWS", request.param)


def inputs(rows, items, dtype=torch.float64):
    tensors = torch.randn(rows, 5), torch.randn(items, 5), torch.randn(items)
    return [t.to(dtype).requires_grad_() for t in tensors] + [torch.randint(items, (rows,))]


def plain(queries, table, bias, target):
    return F.cross_entropy(queries @ table.T + bias, target)


@pytest.mark.parametrize(("rows", "items", "chunk"), [(1, 1, 8), (7, 11, 22), (64, 3, 1), (20, 50, 1 << 20)])
def test_loss_and_gradients_equal_pytorch(monkeypatch, rows, items, chunk):
    monkeypatch.setattr(catalogue_blocks, "_CHUNK", chunk)
    torch.manual_seed(rows)
    args = inputs(rows, items)
    got, want = loss_of(*args), plain(*args)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(3 * got, args[:3]), torch.autograd.grad(3 * want, args[:3])):
        torch.testing.assert_close(one, other)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(catalogue_blocks, "_CHUNK", 14)
    *tensors, target = inputs(5, 7)
    assert torch.autograd.gradcheck(lambda *t: loss_of(*t, target), tensors)


def test_no_rows_cost_nothing():
    args = inputs(0, 4)
    loss = loss_of(*args)
    loss.backward()
    assert loss == 0
    assert not args[1].grad.any()


def test_bfloat16_products_under_autocast():
    torch.manual_seed(0)
    args = inputs(64, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(*args)
        want = plain(*args)
    exact = plain(*(t.double() if t.is_floating_point() else t for t in args))
    assert abs(loss - exact) <= 2 * abs(want - exact) + 1e-3
    loss.backward()
    assert args[0].grad.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 60, 1 << 20])
def test_what_a_history_holds_already_is_left_out(monkeypatch, chunk):
    """Two histories, rows 0..2 and 3..4: each row leaves out its own item and those before it."""
    monkeypatch.setattr(catalogue_blocks, "_CHUNK", chunk)
    torch.manual_seed(0)
    *tensors, _ = inputs(5, 9)
    columns, first = torch.tensor([4, 1, 7, 4, 2]), torch.tensor([0, 0, 0, 3, 3])
    target = torch.tensor([1, 7, 0, 2, 8])
    scores = tensors[0] @ tensors[1].T + tensors[2]
    for row, gone in enumerate([[4], [4, 1], [4, 1, 7], [4], [4, 2]]):
        scores[row, gone] = -torch.inf
    want = F.cross_entropy(scores, target)
    got = loss_of(*tensors, target, (columns, first))
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 20, 60, 1 << 20])
def test_what_was_seen_before_the_rows_is_left_out(monkeypatch, chunk):
    """Three users, of 2, 0 and 3 rows; the first has seen 4 and 7, the last 0 and something that is not listed."""
    monkeypatch.setattr(catalogue_blocks, "_CHUNK", chunk)
    torch.manual_seed(0)
    *tensors, _ = inputs(5, 9)
    older = torch.tensor([7, 4, 2, 0, -1]), torch.tensor([0, 2, 3, 5]), torch.tensor([0, 0, 2, 2, 2])
    target = torch.tensor([1, 6, 4, 2, 8])
    seen = torch.tensor([3, 5, 1, 3, 0]), torch.tensor([0, 0, 2, 2, 2])
    scores = tensors[0] @ tensors[1].T + tensors[2]
    for row, gone in enumerate([[4, 7, 3], [4, 7, 3, 5], [0, 1], [0, 1, 3], [0, 1, 3]]):
        scores[row, gone] = -torch.inf
    want = F.cross_entropy(scores, target)
    got = loss_of(*tensors, target, seen, older=older)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 60, 1 << 20])
def test_a_sample_is_corrected_but_for_the_target(monkeypatch, chunk):
    """Columns 5 and 8 were not drawn: they are there as targets alone. A row that has seen 3 does not choose it."""
    monkeypatch.setattr(catalogue_blocks, "_CHUNK", chunk)
    torch.manual_seed(0)
    *tensors, _ = inputs(4, 9)
    target, log_expected = torch.tensor([5, 8, 0, 5]), torch.randn(9, dtype=torch.float64)
    log_expected[[5, 8]] = torch.inf
    seen = torch.tensor([-1, 3, -1, 2]), torch.tensor([0, 0, 0, 3])
    plain_scores = tensors[0] @ tensors[1].T + tensors[2]
    own = F.one_hot(target, 9).bool()
    scores = torch.where(own, plain_scores, plain_scores - log_expected)
    gone = torch.zeros(4, 9, dtype=torch.bool)
    gone[[1, 2, 3], [3, 3, 2]] = True
    want = F.cross_entropy(scores.masked_fill(gone, -torch.inf), target)
    got = loss_of(*tensors, target, seen, log_expected)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors)):
        torch.testing.assert_close(one, other)


def test_a_second_derivative_is_refused_not_wrong():
    *tensors, target = inputs(5, 7)
    loss = loss_of(*tensors, target)
    (gradient,) = torch.autograd.grad(loss**2, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("chunk", [30, 1 << 20])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_bias_adds_up_in_float32(monkeypatch, bias_dtype, chunk):
    """Products of small whole numbers are exact in bfloat16: only what is added up can be off."""
    monkeypatch.setattr(catalogue_blocks, "_CHUNK", chunk)
    queries, table = (torch.randint(-2, 3, (rows, 5)).bfloat16() for rows in (600, 30))
    bias = torch.zeros(30, dtype=bias_dtype, requires_grad=True)
    target = torch.randint(30, (600,))
    (got,) = torch.autograd.grad(loss_of(queries, table, bias, target), bias)
    exact = bias.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(plain(queries.double(), table.double(), exact, target), exact)
    close = 1e-5 if bias_dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, want.to(bias_dtype), rtol=close, atol=1e-7)


def test_blocks_take_no_gradient_where_none_is_recorded(monkeypatch):
    asked, in_blocks = [], catalogue_blocks._in_blocks
    monkeypatch.setattr(catalogue_blocks, "_in_blocks", lambda *args: (asked.append(args[-1][:3]), in_blocks(*args))[1])
    with torch.no_grad():
        loss_of(*inputs(5, 7))
    assert asked == [(False,) * 3]
