"""catalogue_cross_entropy: the kernel against its twin and against float64, and what all its ways promise."""

from types import SimpleNamespace

import pytest
import torch
from attention_cases import assert_as_right_as
from torch.utils.checkpoint import checkpoint

from pcl_ext import ops
from pcl_ext.ops import _native, catalogue_cross_entropy_op
from pcl_ext.ops import catalogue_cross_entropy as loss_of

# wider instruction sets have no kernel of their own (csrc/isa.h)
ISAS = range(min(3, len(_native.C.isas()))) if ops.has_fused() else []


def whole_case(rows, items, dim, *, masks=True):
    """float32, histories of 50 rows, of which every other user has seen something before."""
    queries, table, bias = torch.randn(rows, dim), torch.randn(items, dim) * 0.3, torch.randn(items)
    target = torch.randint(items // 2, items, (rows,))
    if not masks:
        return dict(queries=queries, table=table, bias=bias, target=target)
    first = torch.arange(rows) // 50 * 50
    users = torch.arange(rows) // 50
    offsets = torch.arange(-(-rows // 50) + 1) // 2 * 3
    log_expected = torch.randn(items)
    log_expected[torch.rand(items) < 0.1] = torch.inf
    return dict(
        queries=queries,
        table=table,
        bias=bias,
        target=target,
        seen=(torch.randint(-1, items // 2, (rows,)), first),
        log_expected=log_expected,
        older=(torch.randint(-1, items // 2, (int(offsets[-1]),)), offsets, users),
    )


def to(case, dtype):
    return {n: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in case.items()}


def with_grads(case, impl):
    """Loss and gradients by name."""
    leaves = {name: case[name].detach().requires_grad_() for name in ("queries", "table", "bias")}
    loss = loss_of(**(case | leaves), impl=impl)
    return {"loss": loss.detach()} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def on_isa(case, isa, wanted=(True, True, True)):
    """The kernel of one instruction set."""
    histories = (*case.get("seen", (None,) * 2), *case.get("older", (None,) * 3))
    rest = (case["bias"], case["target"], case.get("log_expected"), *histories, wanted)
    found = catalogue_cross_entropy_op.forward(case["queries"], case["table"], *rest, isa=isa)
    return dict(zip(("loss", "queries", "table", "bias"), found))


SHAPES = [(1, 1, 1), (1, 70, 16), (100, 37, 16), (333, 1000, 64), (50, 300, 100), (301, 130, 300)]


@pytest.mark.needs_ext
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_as_right_as_its_twin(shape, isa, masks):
    case = whole_case(*shape, masks=masks and shape[1] > 1)
    exact = with_grads(to(case, torch.float64), "reference")
    assert_as_right_as(on_isa(case, isa), with_grads(case, "reference"), exact)


@pytest.mark.needs_ext
def test_fused_takes_the_kernel_and_blocks_give_the_same():
    case = whole_case(120, 90, 20)
    want = with_grads(to(case, torch.float64), "auto")  # blocks
    torch.testing.assert_close(want, with_grads(to(case, torch.float64), "reference"))
    got = with_grads(case, "fused")
    torch.testing.assert_close(got, on_isa(case, _native.BEST_ISA), rtol=0, atol=0)
    torch.testing.assert_close(to(got, torch.float64), want, rtol=1e-4, atol=1e-6)


@pytest.mark.needs_ext
@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_bits(isa):
    case = whole_case(500, 2000, 64)  # work enough to be shared by three
    torch.set_num_threads(1)
    want = on_isa(case, isa)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(on_isa(case, isa), want, rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_wanted_is_computed(wanted):
    case = whole_case(60, 200, 32)
    whole, some = on_isa(case, -1), on_isa(case, -1, wanted)
    assert torch.equal(some["loss"], whole["loss"])
    for name, want in zip(("queries", "table", "bias"), wanted):
        assert torch.equal(some[name], whole[name]) if want else some[name].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_frozen_table_has_no_gradient(dtype):
    case = to(whole_case(60, 200, 32), dtype)
    want = with_grads(case, "reference")["queries"]
    queries = case["queries"].requires_grad_()
    loss_of(**case).backward()
    torch.testing.assert_close(queries.grad, want)
    assert case["table"].grad is None
    assert case["bias"].grad is None


@pytest.mark.needs_ext
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["queries", "table", "bias"])
def test_what_is_not_finite_is_not_hidden(place, wrong):
    case = whole_case(30, 200, 32, masks=False)
    case[place].view(-1)[3] = wrong
    assert not with_grads(case, "fused")["loss"].isfinite()


@pytest.mark.needs_ext
def test_a_target_that_was_seen_costs_everything_in_both():
    case = whole_case(3, 200, 32)
    case["seen"] = (case["target"], torch.zeros(3, dtype=torch.int64))
    assert with_grads(case, "fused")["loss"] == with_grads(case, "reference")["loss"] == torch.inf


@pytest.mark.needs_ext
def test_strided_inputs_give_the_same_bits():
    case = whole_case(30, 200, 32)
    strided = case | {n: case[n].t().contiguous().t() for n in ("queries", "table")}
    strided |= {n: torch.stack([case[n], case[n]], 1)[:, 0] for n in ("bias", "target")}
    torch.testing.assert_close(with_grads(strided, "fused"), with_grads(case, "fused"), rtol=0, atol=0)


@pytest.mark.needs_ext
def test_under_torch_compile():
    case = whole_case(30, 200, 32)
    compiled = torch.compile(lambda c: loss_of(**c), fullgraph=True, backend="aot_eager")
    queries = case["queries"].requires_grad_()
    compiled(case).backward()
    got, queries.grad = queries.grad, None
    loss_of(**case).backward()
    assert torch.equal(got, queries.grad)


@pytest.mark.needs_ext
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target=torch.full((30,), 200)), "target must lie in 0..199"),
        (dict(seen=(torch.full((30,), 200), torch.zeros(30).long())), "columns of seen must lie in -1..199"),
        (dict(older=(torch.tensor([200]), torch.tensor([0, 1]), torch.zeros(30).long())), "columns of older must lie"),
    ],
    ids=["target", "seen", "older"],
)
def test_compiled_programs_look_at_values(change, message):
    case = whole_case(30, 200, 32, masks=False)
    compiled = torch.compile(lambda c: loss_of(**c, impl="fused"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        compiled(case | change)


@pytest.mark.needs_ext
def test_exported_for_any_number_of_rows():
    class Loss(torch.nn.Module):
        def forward(self, queries, table, bias, target):
            return loss_of(queries, table, bias, target, impl="fused")

    rows = {0: torch.export.Dim("rows")}
    case = whole_case(30, 200, 32, masks=False)
    program = torch.export.export(Loss(), tuple(case.values()), dynamic_shapes=(rows, None, None, rows)).module()
    fewer = case | {name: case[name][:7] for name in ("queries", "target")}
    torch.testing.assert_close(program(*fewer.values()), loss_of(**fewer, impl="fused"), rtol=0, atol=0)


@pytest.mark.needs_ext
@pytest.mark.filterwarnings("ignore:.*batching rule.*:UserWarning")
def test_vmap_over_models_keeps_every_gradient():
    case = whole_case(6, 20, 16, masks=False)
    names, target = ("queries", "table", "bias"), torch.stack([case["target"], case["target"].flip(0)])

    def gradients(impl):
        leaves = [torch.stack([case[n], case[n] + 1]).requires_grad_() for n in names]
        losses = torch.vmap(lambda *args: loss_of(*args, impl=impl))
        if impl == "reference":
            losses = lambda *models: torch.stack([loss_of(*one, impl=impl) for one in zip(*models)])  # noqa: E731
        return torch.autograd.grad((losses(*leaves, target) ** 2).sum(), leaves)

    torch.testing.assert_close(gradients("fused"), gradients("reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.needs_ext
def test_the_op_is_an_ordinary_one():
    case = whole_case(60, 20, 16)
    leaves = [case[name].requires_grad_() for name in ("queries", "table", "bias")]
    rest = (case["target"], case["log_expected"], *case["seen"], *case["older"])
    for wanted in ([False] * 3, [True, False, True]):
        torch.library.opcheck(catalogue_cross_entropy_op.OP, (*leaves, *rest, wanted))


@pytest.mark.needs_ext
def test_no_gradient_is_taken_where_none_is_recorded(monkeypatch):
    case, asked, kernel = whole_case(30, 200, 32), [], _native.C.catalogue_cross_entropy
    for name in ("queries", "table", "bias"):
        case[name].requires_grad_()
    module = SimpleNamespace(catalogue_cross_entropy=lambda *args: (asked.append(args[1][1:]), kernel(*args)))
    monkeypatch.setattr(catalogue_cross_entropy_op, "C", module)
    with torch.no_grad():
        loss_of(**case, impl="fused")
    assert asked == [(0, 0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpoint(dtype, reentrant):
    case = to(whole_case(60, 200, 32), dtype)
    want = with_grads(case, "auto")
    for name in ("queries", "table", "bias"):
        case[name].requires_grad_()
    checkpoint(
        lambda q, t, b: loss_of(**case | dict(queries=q, table=t, bias=b)),
        *list(case.values())[:3],
        use_reentrant=reentrant,
    ).backward()
    for name in ("queries", "table", "bias"):
        torch.testing.assert_close(case[name].grad, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_tensors_that_are_still_to_be_negated(impl):
    case = whole_case(30, 200, 32)
    negated = case | {n: torch.complex(0 * case[n], -case[n]).conj().imag for n in ("queries", "table", "bias")}
    assert negated["queries"].is_neg()
    torch.testing.assert_close(with_grads(negated, impl), with_grads(case, impl), rtol=0, atol=0)


def test_the_scale_of_a_loss_reaches_gradients_in_float16():
    """65,536 is no float16, and a mean's gradients alone are too small for it."""
    case = to(whole_case(2000, 300, 8, masks=False), torch.float16)
    exact = to(case, torch.float64)
    found, want = (torch.autograd.grad(65536 * loss_of(**c), c["queries"])[0] for c in map(asking, (case, exact)))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), want, rtol=0.01, atol=0.01)


def asking(case):
    """case, whose queries ask for a gradient."""
    return case | {"queries": case["queries"].detach().requires_grad_()}


def test_float64_stays_itself_under_autocast():
    case = to(whole_case(30, 200, 32), torch.float64)
    want = with_grads(case, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(with_grads(case, "auto"), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("items", [0, 4])
def test_no_rows_of_any_catalogue(dtype, items):
    case = to(dict(queries=torch.zeros(0, 5), table=torch.zeros(items, 5), bias=torch.zeros(items)), dtype)
    found = with_grads(case | dict(target=torch.zeros(0).long()), "auto")
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_expected_that_asks_for_a_gradient_is_refused(dtype):
    case = to(whole_case(30, 200, 32), dtype)
    case["log_expected"].requires_grad_()
    with pytest.raises(ValueError, match="log_expected asks for a gradient, and gets none: detach it"):
        loss_of(**case)
    assert torch.autograd.grad(loss_of(**case, impl="reference"), case["log_expected"])[0].any()
    with torch.no_grad():
        loss_of(**case)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(seen=torch.zeros(2, 3).long()), TypeError, r"seen must be a tuple \(columns, first\), got Tensor"),
        (dict(seen=(torch.zeros(3).long(),)), ValueError, r"seen must be a tuple \(columns, first\), got 1 entries"),
        (dict(older=(1, 2)), ValueError, r"older must be a tuple \(columns, offsets, users\), got 2 entries"),
        (dict(target=torch.zeros(3).int()), TypeError, "target must be int64, got int32"),
    ],
)
def test_errors_of_kind(change, error, message):
    case = dict(queries=torch.zeros(3, 4), table=torch.zeros(9, 4), bias=torch.zeros(9), target=torch.tensor([0, 1, 2]))
    with pytest.raises(error, match=message):
        loss_of(**(case | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(target=torch.tensor([0, 9, 1])), "target must lie in 0..8"),
        (dict(target=torch.tensor([0, -1, 1])), "target must lie in 0..8"),
        (dict(target=torch.tensor([0, 1])), r"target must be \[T\]"),
        (dict(bias=torch.zeros(8)), r"bias must be \[C\]"),
        (dict(table=torch.zeros(9, 5)), r"table must be \[C, D\]"),
        (dict(log_expected=torch.zeros(2)), r"log_expected must be \[C\]"),
        (dict(seen=(torch.tensor([0, 9, 0]), torch.zeros(3, dtype=torch.int64))), "columns of seen must lie in -1..8"),
        (dict(seen=(torch.tensor([0, 1, 0]), torch.tensor([0, 2, 0]))), "at most the row's own number, got 2 in row 1"),
        (dict(seen=(torch.tensor([0, 1, 0]), torch.tensor([-1, 0, 0]))), "first of seen must lie in 0..2"),
        (dict(older=(torch.tensor([9]), torch.tensor([0, 1]), torch.zeros(3).long())), "columns of older must lie"),
        (dict(older=(torch.tensor([1]), torch.tensor([0, 2]), torch.zeros(3).long())), "offsets of older must end"),
        (
            dict(older=(torch.tensor([1]), torch.tensor([0, 1]), torch.ones(3).long())),
            "users of older must lie in 0..0",
        ),
        (dict(older=(torch.tensor([1]), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))), "must never decrease"),
    ],
)
def test_errors(change, message):
    case = dict(queries=torch.zeros(3, 4), table=torch.zeros(9, 4), bias=torch.zeros(9), target=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=message):
        loss_of(**(case | change))
