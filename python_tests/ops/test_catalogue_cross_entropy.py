"""The loss over a catalogue: PyTorch's operations in blocks against PyTorch's own, the kernel against its twin."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_as_right_as
from torch.utils.checkpoint import checkpoint

from pcl_ext import ops
from pcl_ext.ops import _native, catalogue_blocks, catalogue_cross_entropy_op
from pcl_ext.ops import catalogue_cross_entropy as loss_of

ISAS = (
    range(min(3, len(_native.C.isas()))) if ops.has_fused() else []
)  # csrc/isa.h: wider ones have no kernel of their own


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


def test_blocks_take_no_gradient_where_none_is_recorded(monkeypatch):
    asked, in_blocks = [], catalogue_blocks._in_blocks
    monkeypatch.setattr(catalogue_blocks, "_in_blocks", lambda *args: (asked.append(args[-1][:3]), in_blocks(*args))[1])
    with torch.no_grad():
        loss_of(*inputs(5, 7))
    assert asked == [(False,) * 3]


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
