"""linear and feed_forward against their twins and against float64, on every instruction set."""

from dataclasses import replace

import pytest
import torch
from attention_cases import assert_as_right_as
from layer_cases import make_feed_forward, make_linear, normal, run_with_grads, to

from pcl_ext import ops
from pcl_ext.ops import _native

EMULATED_TILES = 5  # csrc/isa.h
ISA_NAMES = _native.C.isas() if ops.has_fused() else []
ISAS = [*range(len(ISA_NAMES)), EMULATED_TILES] if ops.has_fused() else []
CASES = {
    "qkv": lambda: make_linear(70, 64, 192, residual=False),
    "out": lambda: make_linear(70, 64, 64, norm=False),
    "wide": lambda: make_linear(130, 256, 100),
    "deep": lambda: make_linear(70, 300, 35),
    "odd widths": lambda: make_linear(33, 37, 51),
    "narrow": lambda: make_linear(9, 1, 1, bias=False),
    "plain": lambda: make_linear(20, 16, 7, bias=False, norm=False, residual=False),
    "one row": lambda: make_linear(1, 32, 96),
    "no rows": lambda: make_linear(0, 32, 96),
    "feed-forward": lambda: make_feed_forward(70, 64, 256),
    "feed-forward, odd widths": lambda: make_feed_forward(70, 37, 151),
    "feed-forward, narrow": lambda: make_feed_forward(9, 2, 3),
    "feed-forward, one row": lambda: make_feed_forward(1, 32, 128),
    "feed-forward, no rows": lambda: make_feed_forward(0, 32, 128),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def grad_for(case, dtype):
    return torch.randn_like(case.run(impl="reference")).to(dtype)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused_is_as_right_as_the_twin(name, dtype):
    exact = CASES[name]()
    grad_out, case = grad_for(exact, dtype), to(exact, dtype)
    got, want = (run_with_grads(case, grad_out, impl=impl) for impl in ("fused", "reference"))
    if dtype == torch.float64:
        return torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    return assert_as_right_as(got, want, run_with_grads(to(case, torch.float64), grad_out, impl="reference"))


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["qkv", "out", "odd widths", "feed-forward", "feed-forward, odd widths"])
def test_every_instruction_set(name, isa, dtype):
    exact = CASES[name]()
    grad_out, case = grad_for(exact, dtype), to(exact, dtype)
    want = run_with_grads(case, grad_out, impl="reference")
    exact = run_with_grads(to(case, torch.float64), grad_out, impl="reference")
    exact.pop("residual", None)  # that gradient is grad_out itself
    assert_as_right_as(case.run_isa(grad_out, isa), want, exact)


@pytest.mark.needs_ext
@pytest.mark.skipif("amx" not in ISA_NAMES, reason="a processor with AMX")
@pytest.mark.parametrize("scale", [1.0, 1e-19], ids=["", "products below float32's normal range"])
@pytest.mark.parametrize("widths", [(70, 64, 192), (33, 37, 51), (1, 32, 96), (130, 512, 64)], ids=str)
def test_emulated_tiles_do_what_amx_does(widths, scale):
    case = to(make_linear(*widths, norm=False, residual=False, bias=False), torch.bfloat16)
    case = replace(case, x=case.x.detach() * scale, weight=case.weight * scale)
    grad_out = grad_for(case, torch.bfloat16) if scale == 1 else case.run(impl="reference")
    amx, emulated = (case.run_isa(grad_out, isa) for isa in (ISA_NAMES.index("amx"), EMULATED_TILES))
    torch.testing.assert_close(amx, emulated, rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("make", [make_linear, make_feed_forward])
@pytest.mark.parametrize("sizes", [(1100, 64, 256), (50, 256, 1024)], ids=["many rows", "one request"])
def test_threads_do_not_change_bits(sizes, make, isa, dtype):
    case = to(make(*sizes), dtype)  # work enough to be shared
    grad_out = grad_for(case, dtype)
    torch.set_num_threads(1)
    want = case.run_isa(grad_out, isa)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(case.run_isa(grad_out, isa), want, rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["qkv", "wide", "deep", "feed-forward", "feed-forward, odd widths"])
def test_company_does_not_change_bits(name, isa, dtype):
    case = to(CASES[name](), dtype)
    grad_out = grad_for(case, dtype)
    want = case.run_isa(grad_out, isa)
    for rows in (slice(3, 4), slice(8, 10), slice(20, 23), slice(28, 32), slice(1, 40), slice(65, 70)):
        part = {n: x[rows] for n, x in vars(case).items() if n in ("x", "residual") and x is not None}
        got = replace(case, **part).run_isa(grad_out[rows], isa)
        torch.testing.assert_close(got, {n: x[rows] for n, x in want.items()}, rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("size", [0.0, 0.5, 1.4, 3.0, 5.6, 30.0, 1e4])
@pytest.mark.parametrize("isa", ISAS)
def test_gelu_is_right_near_its_edges(size, isa):
    steps = size + torch.linspace(-1e-3, 1e-3, 64)
    case = to(make_feed_forward(1, 128, 128), torch.float32)
    case.bias_in[:] = torch.cat([steps, -steps])
    identity = replace(case, weight_in=0 * case.weight_in, weight_out=torch.eye(128), bias_out=0 * case.bias_out)
    got = replace(identity, x=torch.zeros(1, 128)).run_isa(torch.zeros(1, 128), isa)["out"][0]
    want = torch.nn.functional.gelu(case.bias_in.double())
    assert ((got - want).abs() <= 2e-7 * case.bias_in.abs().clamp(min=1)).all()


@pytest.mark.needs_ext
@pytest.mark.parametrize("name", ["odd widths", "plain", "feed-forward, odd widths"])
def test_gradcheck(name):
    case = CASES[name]()

    def run(x):
        return replace(case, x=x).run(impl="fused")

    assert torch.autograd.gradcheck(run, [case.x])


@pytest.mark.needs_ext
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    case = to(CASES[name](), torch.float32)
    if name.startswith("feed-forward"):
        args = (case.x, *case.norm, case.weight_in, case.bias_in, case.weight_out, case.bias_out, 1e-5)
        torch.library.opcheck(torch.ops.pcl_ext.feed_forward.default, args)
    else:
        args = (case.x, case.weight, case.bias, *(case.norm or (None, None)), case.residual, 1e-5)
        torch.library.opcheck(torch.ops.pcl_ext.linear.default, args)


@pytest.mark.parametrize("impl", ["reference", pytest.param("fused", marks=pytest.mark.needs_ext)])
@pytest.mark.parametrize("name", ["wide", "feed-forward"])
def test_compiles_whole(name, impl):
    case = to(CASES[name](), torch.float32)
    compiled = torch.compile(lambda x: replace(case, x=x).run(impl=impl), fullgraph=True)
    torch.testing.assert_close(compiled(case.x), case.run(impl=impl))
    grads = [torch.autograd.grad(f.square().sum(), case.x)[0] for f in (compiled(case.x), case.run(impl=impl))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.needs_ext
@pytest.mark.parametrize("name", ["qkv", "wide", "feed-forward"])
def test_autocast_multiplies_in_bfloat16_and_keeps_the_residual(name):
    exact = CASES[name]()
    case = to(exact, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = case.run(impl="fused"), case.run(impl="reference")
    assert got.dtype == want.dtype
    assert_as_right_as({"out": got}, {"out": want}, {"out": exact.run(impl="reference")})


@pytest.mark.needs_ext
@pytest.mark.parametrize("name", ["wide", "feed-forward"])
def test_strided_rows_give_the_same_bits(name):
    case = to(CASES[name](), torch.float32)
    for x in (torch.cat([case.x, case.x], 1)[:, : case.x.shape[1]], case.x.t().contiguous().t()):
        assert torch.equal(replace(case, x=x).run(), case.run())


@pytest.mark.parametrize("name", ["wide", "feed-forward"])
def test_trained_weights_take_the_twin(name):
    case = to(CASES[name](), torch.float32)
    weight = "weight" if name == "wide" else "weight_in"
    trained = replace(case, **{weight: normal(*getattr(case, weight).shape).float().requires_grad_()})
    trained.run().sum().backward()
    assert getattr(trained, weight).grad is not None
    if ops.has_fused():
        with pytest.raises(ValueError, match="impl='fused' takes frozen weights, got weight"):
            trained.run(impl="fused")


MIXED = {
    "float16 autocast": (torch.float16, {}),
    "float64 residual": (torch.bfloat16, {"residual": torch.float64}),
    "float16 residual": (torch.bfloat16, {"residual": torch.float16}),
}


@pytest.mark.parametrize("name", MIXED)
def test_dtypes_that_kernels_do_not_take_together_take_the_twin(name):
    dtype, others = MIXED[name]
    case = to(CASES["wide"](), torch.float32)
    case = replace(case, **{n: getattr(case, n).detach().to(d) for n, d in others.items()})
    with torch.autocast("cpu", dtype):
        got, want = case.run(), case.run(impl="reference")
        if ops.has_fused():
            with pytest.raises(TypeError, match="impl='fused' takes float32 and bfloat16 together"):
                case.run(impl="fused")
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("part", ["weight", "bias", "norm"])
def test_float64_among_others_under_autocast_is_an_error(part):
    case = to(CASES["wide"](), torch.float32)
    value = getattr(case, part)
    wrong = tuple(x.double() for x in value) if part == "norm" else value.double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):  # torch's own, of the twin
        replace(case, **{part: wrong}).run()


def test_what_is_left_out_where_it_must_not_be():
    linear, block = to(CASES["wide"](), torch.float32), to(CASES["feed-forward"](), torch.float32)
    for case in (linear, block):
        with pytest.raises(TypeError, match="norm bias must be a Tensor, got NoneType"):
            replace(case, norm=(case.norm[0], None)).run()
    for name in ("bias_in", "bias_out"):
        with pytest.raises(TypeError, match=f"{name} must be a Tensor, got NoneType"):
            replace(block, **{name: None}).run()
    with pytest.raises(TypeError, match="norm must be the pair"):
        replace(block, norm=()).run()
    with pytest.raises(TypeError, match="weight must be a Tensor, got list"):
        ops.linear(linear.x, [[1.0]])
    with pytest.raises(TypeError, match="eps must be a number"):
        ops.linear(linear.x, linear.weight, eps=None)


WRONG = {
    "x must have 2 dimensions": {"x": torch.zeros(3)},
    r"weight must be \[N, D\]": {"weight": torch.zeros(100, 7)},
    r"bias must be \[N\]": {"bias": torch.zeros(7)},
    r"norm weight must be \[D\]": {"norm": (torch.zeros(7), torch.zeros(256))},
    r"norm must be the pair": {"norm": torch.zeros(256)},
    r"residual must be \[T, N\]": {"residual": torch.zeros(3, 100)},
    "weight must have the dtype of x": {"weight": torch.zeros(100, 256, dtype=torch.float64)},
    "residual must have the dtype of x": {"residual": torch.zeros(130, 100, dtype=torch.float64)},
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_named(message):
    case = to(CASES["wide"](), torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        replace(case, **WRONG[message]).run()


@pytest.mark.needs_ext
def test_a_weight_at_an_odd_place():
    """Pairs of bfloat16 numbers are read at once, at addresses of whole pairs."""
    x, numbers = torch.randn(4, 64).bfloat16(), torch.randn(64 * 64 + 1).bfloat16()
    weight = numbers[1:].view(64, 64)
    assert weight.data_ptr() % 4 == 2
    assert torch.equal(ops.linear(x, weight, impl="fused"), ops.linear(x, weight.clone(), impl="fused"))
