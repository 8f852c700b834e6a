"""embed: its twin, its gradients, its mistakes."""

import pytest
import torch
from attention_cases import IMPLS, to_offsets
from embed_cases import make, with_grads

from pcl_ext import ops
from pcl_ext.ops import _native, embed_op

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LENGTHS = [[1], [3, 1, 2], [5, 0, 4], [0, 0], [], [7] * 9, [400, 30]]
ISAS = range(len(_native.C.isas())) if ops.has_fused() else []


def with_grads_isa(arguments, grad_out, isa):
    """with_grads by one instruction set's kernels."""
    values = [x.detach() for x in arguments.values()]
    grads = embed_op.backward(grad_out.to(values[2]), *values, [True] * 3, isa=isa)
    return {"out": embed_op.forward(*values, isa=isa), **dict(zip(("table", "position", "prompt"), grads))}


def check(arguments, isa=None):
    """fused (or one instruction set) at most twice as far from float64 as the twin, one rounding free."""
    grad_out = torch.randn(len(arguments["items"]), arguments["table"].shape[1]).to(arguments["table"].device)
    double = {n: x.detach().double().requires_grad_() if x.is_floating_point() else x for n, x in arguments.items()}
    exact = with_grads(double, grad_out.to(arguments["table"].dtype), impl="reference")
    want = with_grads(arguments, grad_out, impl="reference")
    got = with_grads(arguments, grad_out, impl="fused") if isa is None else with_grads_isa(arguments, grad_out, isa)
    for name, right in exact.items():
        allowed = 2 * (want[name].double() - right).norm()
        rounding = torch.finfo(got[name].dtype).eps * right.norm()
        assert (got[name].double() - right).norm() <= max(allowed, rounding), name


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_definition(impl, device):
    arguments = make([5, 0, 3], device=device)
    arguments["prompt_index"] = torch.tensor([1, 0, -1], device=device)
    out = ops.embed(**arguments, impl=impl)
    items, table, position, prompt = (arguments[n] for n in ("items", "table", "position", "prompt"))
    for t, (r, which) in enumerate([(4, 1), (3, 1), (2, 1), (1, 1), (0, 1), (2, -1), (1, -1), (0, -1)]):
        want = table[items[t]] + position[r]
        if which >= 0 and r < 4:
            want = want + prompt[which, 3 - r]
        torch.testing.assert_close(out[t], want)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_fused_is_as_right_as_the_twin(lengths, dtype, device):
    check(make(lengths, dtype=dtype, device=device))


@pytest.mark.parametrize("dim", [8, 20, 100])
def test_float16(cuda, dim):
    check(make([30, 5, 0, 40, 9, 9, 1], dim=dim, dtype=torch.float16, device=cuda))


@pytest.mark.parametrize("lengths", [[3] * 700, [600, 1] * 3], ids=["many", "long"])
@pytest.mark.parametrize("prompts", [1, 70])
def test_several_blocks_share_the_gradients(cuda, lengths, prompts):
    arguments = make(lengths, dim=16, prompts=prompts, device=cuda)
    check(arguments)
    check({n: x for n, x in arguments.items() if not n.startswith("prompt")})


@pytest.mark.needs_ext
@pytest.mark.parametrize("dim", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("item_dtype", [torch.int32, torch.int64], ids=str)
def test_widths_and_item_types(dim, item_dtype, device):
    check(make([5, 30], dim=dim, item_dtype=item_dtype, device=device))


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [5, 32, 64, 100, 128])
def test_every_instruction_set(dim, isa, dtype):
    check(make([30, 5, 0, 40, 9, 9, 1], dim=dim, dtype=dtype), isa)


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_a_width_that_has_loops_of_its_own_has_the_bits_of_any(dim, isa, dtype):
    wide = [x.detach() for x in make([30, 5, 0, 40, 9, 9, 1], dim=dim + 8, dtype=dtype).values()]
    narrow = [x[..., :dim].contiguous() if x.is_floating_point() else x for x in wide]
    assert torch.equal(embed_op.forward(*narrow, isa=isa), embed_op.forward(*wide, isa=isa)[:, :dim])


@pytest.mark.needs_ext
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_give_the_same_bits(dtype):
    arguments = make([30, 5, 0, 40, 9, 9, 1], dim=100, dtype=dtype)
    arguments["table"].data[3] = float("nan")
    grad_out = torch.randn(94, 100)
    want = with_grads_isa(arguments, grad_out, 0)
    for isa in ISAS:
        torch.testing.assert_close(with_grads_isa(arguments, grad_out, isa), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.needs_ext
def test_one_prompt_for_all_and_one_each_sum_the_same_bits():
    arguments = make([30, 5, 0, 40, 9], prompts=1)
    grad_out = torch.randn(84, 8)
    arguments["prompt_index"] = torch.zeros(5, dtype=torch.int64)
    want = with_grads(arguments, grad_out)
    torch.testing.assert_close(with_grads({**arguments, "prompt_index": None}, grad_out), want, rtol=0, atol=0)
    assert torch.equal(want["prompt"][0].flip(0), want["position"][:4])


@pytest.mark.needs_ext
@pytest.mark.parametrize("at", [0, 700, 1999])
def test_an_id_is_refused_wherever_it_lies(at):
    arguments = make([2000])
    arguments["items"][at] = 12
    with pytest.raises(ValueError, match=f"items must lie in 0..11, got 12 at index {at}"):
        ops.embed(**arguments)


@pytest.mark.needs_ext
@pytest.mark.parametrize("left_out", [["position"], ["prompt", "prompt_index"], ["position", "prompt", "prompt_index"]])
def test_left_out(left_out, device):
    arguments = make([5, 3], device=device)
    check({n: x for n, x in arguments.items() if n not in left_out})


@pytest.mark.needs_ext
def test_one_prompt_needs_no_index(device):
    arguments = make([5, 3], prompts=1, device=device)
    arguments["prompt_index"] = torch.zeros(2, dtype=torch.int64, device=device)
    want = ops.embed(**arguments)
    del arguments["prompt_index"]
    assert torch.equal(ops.embed(**arguments), want)
    assert torch.equal(ops.embed(**arguments, impl="reference"), want)


@pytest.mark.needs_ext
def test_empty_prompt_and_empty_positions():
    arguments = make([2, 3], prompt_len=0)
    check(arguments)
    arguments |= {"position": torch.zeros(0, 8), "items": arguments["items"][:0], "offsets": to_offsets([0, 0])}
    assert ops.embed(**arguments).shape == (0, 8)
    arguments |= {"items": torch.ones(1, dtype=torch.int64), "offsets": to_offsets([0, 1])}
    with pytest.raises(ValueError, match="at most max_len = 0 long, got one of 1"):
        ops.embed(**arguments)


@pytest.mark.needs_ext
@pytest.mark.parametrize("lengths", [[3, 2], [1, 0, 4]], ids=str)
def test_gradcheck(lengths, device):
    arguments = make(lengths, dtype=torch.float64, dim=3, device=device)
    tables = [arguments[n] for n in ("table", "position", "prompt")]

    def run(table, position, prompt):
        tables = {"table": table, "position": position, "prompt": prompt}
        return ops.embed(**{**arguments, **tables}, impl="fused")

    assert torch.autograd.gradcheck(run, tables)


@pytest.mark.needs_ext
@pytest.mark.parametrize("asked", ["table", "position", "prompt"])
def test_only_what_is_asked_for(asked, device):
    arguments = make([30, 12, 5], device=device)
    grad_out = torch.randn(47, 8, device=device)
    want = with_grads(arguments, grad_out, impl="fused")[asked]
    for name in ("table", "position", "prompt"):
        arguments[name].requires_grad_(name == asked)
    (got,) = torch.autograd.grad(ops.embed(**arguments, impl="fused"), arguments[asked], grad_out)
    assert torch.equal(got, want)


@pytest.mark.needs_ext
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("left_out", [[], ["position", "prompt", "prompt_index"]])
def test_opcheck(grad, left_out):
    arguments = make([4, 0, 2])
    for name in ("table", "position", "prompt"):
        arguments[name] = arguments[name].detach().requires_grad_(grad)
    values = [None if n in left_out else x for n, x in arguments.items()]
    torch.library.opcheck(torch.ops.pcl_ext.embed.default, tuple(values))


@pytest.mark.needs_ext
def test_compiles_as_one_graph():
    arguments = make([4, 0, 2])
    rest = {n: x for n, x in arguments.items() if n != "prompt"}

    def step(prompt):
        return ops.embed(prompt=2 * prompt, **rest).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(arguments["prompt"]), arguments["prompt"]) for f in (compiled, step))
    assert torch.equal(got[0], want[0])


@pytest.mark.needs_ext
def test_strided_tables_give_the_same_bits(device):
    arguments = make([5, 3], device=device)
    want = ops.embed(**arguments)
    for name in ("table", "position", "prompt"):
        x = arguments[name]
        wide = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
        slanted = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert torch.equal(ops.embed(**{**arguments, name: wide}), want)
        assert torch.equal(ops.embed(**{**arguments, name: slanted}), want)


@pytest.mark.needs_ext
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_bits(threads):
    arguments = make(torch.randint(0, 90, (200,)).tolist(), dim=64)
    grad_out = torch.randn(len(arguments["items"]), 64)
    torch.set_num_threads(1)
    want = with_grads(arguments, grad_out, impl="fused")
    torch.set_num_threads(threads)
    torch.testing.assert_close(with_grads(arguments, grad_out, impl="fused"), want, rtol=0, atol=0)


@pytest.mark.needs_ext
def test_company_does_not_change_bits(device):
    lengths = [9, 0, 33, 2]
    arguments = make(lengths, device=device)
    crowd = ops.embed(**arguments)
    for b, (begin, end) in enumerate(zip(arguments["offsets"][:-1], arguments["offsets"][1:])):
        index = arguments["prompt_index"][b : b + 1]
        alone = {"items": arguments["items"][begin:end], "prompt_index": index}
        alone["offsets"] = to_offsets([lengths[b]]).to(device)
        assert torch.equal(ops.embed(**{**arguments, **alone}), crowd[begin:end])


ids = torch.tensor
MISTAKES = [
    ("items", [1, 2], TypeError, "items must be a Tensor, got list"),
    ("items", torch.ones(5), TypeError, "items must be int32 or int64, got float32"),
    ("items", torch.ones(5, 1, dtype=torch.int64), ValueError, "items must have 1 dimensions"),
    ("items", ids([1, 2, 12, 4, 5]), ValueError, "items must lie in 0..11, got 12 at index 2"),
    ("items", ids([1, 2, 3, -1, 5]), ValueError, "items must lie in 0..11, got -1 at index 3"),
    ("items", ids([1, 2, 2**40, 4, 5]), ValueError, "items must lie in 0..11, got 1099511627776"),
    ("offsets", ids([0, 3, 6]), ValueError, r"offsets must end at len\(items\) = 5, got 6"),
    ("offsets", ids([0, 6, 5]), ValueError, "offsets must never decrease, got 6 then 5 at index 2"),
    ("offsets", ids([1, 3, 5]), ValueError, "offsets must start at 0, got 1"),
    ("offsets", ids([0, 3, 5], dtype=torch.int32), TypeError, "offsets must be int64, got int32"),
    ("table", torch.zeros(12, 8, dtype=torch.int64), TypeError, "table must be float32"),
    ("table", torch.zeros(0, 8), ValueError, "table must hold at least one row"),
    ("table", torch.zeros(12), ValueError, "table must have 2 dimensions"),
    ("table", torch.zeros(12, 8, device="meta"), ValueError, "table must be on the device of items"),
    ("position", torch.zeros(6, 7), ValueError, r"position must be \[max_len, D\] = .6, 8., got .6, 7."),
    ("position", torch.zeros(6, 8, dtype=torch.float64), TypeError, "position must have the dtype of table"),
    ("position", torch.zeros(2, 8), ValueError, "histories must be at most max_len = 2 long, got one of 3"),
    ("prompt", torch.zeros(3, 8), ValueError, "prompt must have 3 dimensions"),
    ("prompt", torch.zeros(3, 4, 9), ValueError, r"prompt must be \[K, P, D\]"),
    ("prompt", None, ValueError, "prompt_index needs a prompt"),
    ("prompt_index", ids([0, 3]), ValueError, "prompt_index must lie in -1..2, got 3 at index 1"),
    ("prompt_index", ids([-2, 0]), ValueError, "prompt_index must lie in -1..2, got -2 at index 0"),
    ("prompt_index", ids([0]), ValueError, r"prompt_index must be \[B\] = .2,., got .1,."),
    ("prompt_index", ids([0.0, 1.0]), TypeError, "prompt_index must be int64, got float32"),
    ("prompt_index", None, ValueError, "prompt_index may be left out only when there is one prompt, got 3"),
    ("impl", "quick", ValueError, "impl must be one of"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "value", "error", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_mistakes_are_named(name, value, error, message, impl):
    with pytest.raises(error, match=message):
        ops.embed(**{"impl": impl, **make([3, 2]), name: value})


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_width(impl):
    arguments = make([2, 3], dim=0)
    assert ops.embed(**arguments, impl=impl).shape == (5, 0)


@pytest.mark.needs_ext
@pytest.mark.parametrize("wanted", [("position",), ("prompt",), ("position", "prompt")])
def test_prompts_end_within_a_task(wanted):
    """A task has 8 distances; prompts of 4, 11 and 30 rows end in the first, in the second and past the histories."""
    for prompt_len in (4, 11, 30):
        arguments = make([20, 3, 0, 9, 12], prompts=5, prompt_len=prompt_len)
        grad = torch.randn(44, 8)
        tables = [arguments[name] for name in wanted]
        got, want = (torch.autograd.grad(ops.embed(**arguments, impl=i), tables, grad) for i in ("fused", "reference"))
        torch.testing.assert_close(got, want)


@pytest.mark.needs_ext
@pytest.mark.parametrize(
    "offsets", [[0, 2**63 - 1, -2, 3], [0, 2**63 - 2**30, -(2**30) - 1, 3], [0, -(2**63), 3]], ids=str
)
def test_offsets_whose_difference_overflows_are_refused(offsets):
    arguments = make([3], prompts=1)
    arguments |= {"offsets": torch.tensor(offsets), "position": None, "prompt_index": None}
    with pytest.raises(ValueError, match="offsets must never decrease"):
        ops.embed(**arguments, impl="fused")
    with pytest.raises(ValueError, match="offsets must never decrease"):
        ops.to_padded(torch.randn(3, 4), arguments["offsets"], 5, impl="fused")
    with pytest.raises(ValueError, match="offsets must never decrease"):
        ops.to_packed(torch.randn(len(offsets) - 1, 5, 4), arguments["offsets"], 3, impl="fused")
