"""Calls past the dispatcher: only where nobody would see the difference."""

import pytest
import torch
from attention_cases import make, to_offsets
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pcl_ext import ops

pytestmark = pytest.mark.needs_ext
OFFSETS, SHORTER, IDS = to_offsets([3, 5]), to_offsets([3, 4]), torch.arange(8)


class Seen(TorchDispatchMode):
    """Names of the ops that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note it, run it."""
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def attention(rows):
    """prompt_attention of rows with a plan."""
    q = rows.reshape(8, 2, 4)
    return ops.prompt_attention(q, q, q, OFFSETS, plan=ops.attention_plan(OFFSETS))


CALLS = {
    "prompt_attention": attention,
    "embed": lambda table: ops.embed(IDS, OFFSETS, table),
    "to_padded": lambda packed: ops.to_padded(packed, OFFSETS, 5),
    "to_packed": lambda padded: ops.to_packed(padded.reshape(2, 4, 8), SHORTER, 7),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mode_sees_the_op(name):
    rows = torch.randn(8, 8)
    want = CALLS[name](rows)
    with Seen() as seen:
        got = CALLS[name](rows)
    assert f"pcl_ext::{name}" in seen.names
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.requires_grad_()], ids=["parameter", "tensor"])
def test_a_gradient_is_kept_unless_it_is_off(name, kind):
    rows = kind(torch.randn(8, 8))
    out = CALLS[name](rows)
    assert out.requires_grad
    with torch.no_grad():
        assert not CALLS[name](rows).requires_grad
    with torch.inference_mode():
        assert torch.equal(CALLS[name](rows), out)


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_is_not_asked(name):
    rows = torch.randn(8, 8)
    want = CALLS[name](rows)
    with torch.device("meta"):
        assert torch.equal(CALLS[name](rows), want)


def test_a_plan_does_not_hide_mistakes():
    case = make([3, 5], [4, 2])
    rows = {n: x.detach() for n, x in case.rows.items()}
    plan = ops.attention_plan(case.offsets, case.prefix_offsets)
    call = {**rows, "offsets": case.offsets, "prefix_offsets": case.prefix_offsets, "plan": plan}
    want = ops.prompt_attention(**call)
    assert torch.equal(ops.prompt_attention(**{**call, "plan": None}), want)
    for name, value, error in [
        ("k", rows["k"].double(), TypeError),
        ("v", rows["v"][:7], ValueError),
        ("prefix_v", rows["prefix_v"][:, :1], ValueError),
        ("prefix_k", None, ValueError),
        ("q", rows["q"][..., :0], ValueError),
        ("prefix_offsets", None, ValueError),
        ("prefix_index", torch.tensor([1, 1]), ValueError),
        ("q", rows["q"].to_sparse(), TypeError),
    ]:
        with pytest.raises(error, match="must|come together"):
            ops.prompt_attention(**{**call, name: value})


def _second_derivative(run, *shape):
    """Of the sum of squares of a gradient, by autograd.grad; a part of the loss has an ordinary gradient."""
    x = torch.randn(*shape, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum() + x.sum(), x)[0]


HISTORIES = torch.tensor([0, 4, 4, 9])
ONCE = {
    "prompt_attention": (lambda x: ops.prompt_attention(x, x, x, HISTORIES), (9, 2, 16)),
    "embed": (lambda x: ops.embed(torch.arange(9) % 6, HISTORIES, x), (6, 8)),
    "linear": (lambda x: ops.linear(x, torch.ones(4, 8, dtype=torch.double), impl="fused"), (9, 8)),
    "feed_forward": (
        lambda x: ops.feed_forward(
            x,
            (torch.ones(8).double(), torch.zeros(8).double()),
            *_feed_forward_weights(),
            torch.zeros(8).double(),
            impl="fused",  # without AVX2 "auto" takes torch's products, which have a second derivative
        ),
        (9, 8),
    ),
}


def _feed_forward_weights():
    weight = torch.linspace(-1, 1, 128, dtype=torch.double).view(16, 8)
    return weight, torch.zeros(16).double(), weight.t().contiguous()


@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_is_refused_not_zero(name):
    with pytest.raises(RuntimeError, match="kernels have no second derivative"):
        _second_derivative(ONCE[name][0], *ONCE[name][1])


@pytest.mark.parametrize(
    ("run", "shape"),
    [(lambda x: ops.to_padded(x, HISTORIES, 5), (9, 2)), (lambda x: ops.to_packed(x, HISTORIES, 9), (3, 5, 2))],
    ids=["to_padded", "to_packed"],
)
def test_layout_changes_have_a_second_derivative(run, shape):
    assert torch.autograd.gradgradcheck(run, torch.randn(*shape, dtype=torch.double, requires_grad=True))


def test_a_checkpoint_around_an_op_takes_a_first_derivative_for_more():
    x = torch.randn(9, 2, 16, requires_grad=True)
    run = ONCE["prompt_attention"][0]
    (got,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sum(), x, create_graph=True)
    assert torch.equal(got, torch.autograd.grad(run(x).sum(), x)[0])


@pytest.mark.parametrize("name", CALLS)
def test_numbers_still_to_be_negated_or_conjugated(name):
    rows = torch.randn(8, 8)
    assert torch.equal(CALLS[name](torch._neg_view(rows)), CALLS[name](-rows))
    if name in ("to_padded", "to_packed"):
        rows = torch.randn(8, 8, dtype=torch.complex64)
        assert torch.equal(CALLS[name](rows.conj()), CALLS[name](rows.conj().resolve_conj()))


@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_not_dropped_in_silence(name):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        CALLS[name](forward_ad.make_dual(torch.randn(8, 8), torch.randn(8, 8)))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["grad", "jvp"])
def test_a_functional_derivative_says_what_to_do(name, kind):
    rows = torch.randn(8, 8)
    derivatives = {
        "grad": lambda: torch.func.grad(lambda x: CALLS[name](x).sum())(rows),
        "jvp": lambda: torch.func.jvp(CALLS[name], (rows,), (rows,)),
    }
    with pytest.raises(RuntimeError, match="torch.func.grad, .* cannot differentiate the kernels .*'reference'"):
        derivatives[kind]()
