"""The same bits: with any number of threads, in any company, in any run; and right on every instruction set."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, assert_as_right_as, make

from pcl_ext import ops
from pcl_ext.ops import _native, prompt_attention_op

pytestmark = pytest.mark.needs_ext
ISAS = range(len(_native.C.isas())) if ops.has_fused() else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["some see none", "longer than a block", "several chunks"])
@pytest.mark.parametrize("dim", [16, 40])
def test_every_instruction_set(name, isa, dtype, dim):
    case = make(*CASES[name], dim=dim, dtype=dtype)
    grad_out = torch.randn(case.rows["q"].shape, dtype=torch.float64).to(dtype)
    exact = case.to(torch.float64).run_with_grads(grad_out, impl="reference")
    assert_as_right_as(case.run_isa(grad_out, isa), case.run_with_grads(grad_out, impl="reference"), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_without_statistics_for_backward_the_output_is_the_same(isa, dtype):
    case = make(*CASES["some see none"], dim=32, dtype=dtype)
    plan, rows = ops.attention_plan(case.offsets, case.prefix_offsets, case.prefix_index), case.rows
    inputs = [rows[n].detach() for n in ("q", "k", "v", "prefix_k", "prefix_v")]
    inputs += [plan.work, plan.batch, plan.num_prefixes, True, 0.25]
    out, stats = prompt_attention_op.forward(*inputs, isa=isa)
    assert torch.equal(prompt_attention_op._fill(*inputs, 0, isa), out)
    assert stats.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_bits(isa, threads):
    case = make(torch.randint(0, 90, (60,)).tolist(), [16, 5], torch.randint(-1, 2, (60,)).tolist(), dim=32)
    grad_out = torch.randn(case.rows["q"].shape)
    torch.set_num_threads(1)
    want = case.run_isa(grad_out, isa)
    torch.set_num_threads(threads)
    for _ in range(3):
        torch.testing.assert_close(case.run_isa(grad_out, isa), want, rtol=0, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_company_does_not_change_bits(isa, dtype):
    lengths, prefixes, index = [40, 3, 0, 130, 7, 1, 19], [16, 5], [0, 1, 0, 0, -1, 1, 1]
    case = make(lengths, prefixes, index, dim=32, dtype=dtype)
    grad_out = torch.randn(case.rows["q"].shape, dtype=torch.float64).to(dtype)
    crowd = case.run_isa(grad_out, isa)
    for b in range(len(lengths)):
        mine = slice(case.offsets[b], case.offsets[b + 1])
        alone = make([lengths[b]], prefixes, index[b : b + 1], dim=32, dtype=dtype)
        for name, rows in case.rows.items():
            alone.rows[name] = rows if name.startswith("prefix") else rows[mine]
        got = alone.run_isa(grad_out[mine], isa)
        for name in ("out", "q", "k", "v"):
            assert torch.equal(got[name], crowd[name][mine]), f"{name} of history {b}"


def _all_at_once(case, grad_out, users: int) -> dict:
    """run_with_grads of histories of one length, as one call of PyTorch's attention."""
    length, prefix = len(case.rows["q"]) // users, len(case.rows["prefix_k"])
    own = [case.rows[n].unflatten(0, (users, length)) for n in "qkv"]
    keys, values = (
        torch.cat([case.rows[f"prefix_{n}"].expand(users, *case.rows["prefix_k"].shape), rows], 1)
        for n, rows in zip("kv", own[1:])
    )
    mask = torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)
    rows = (x.transpose(1, 2) for x in (own[0], keys, values))
    out = F.scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2).flatten(0, 1)
    grads = torch.autograd.grad(out, list(case.rows.values()), grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(case.rows, grads))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_a_large_batch_are_added_up(dtype):
    users, length = 9000, 30  # 270,000 rows: chunks of more than 256
    case = make([length] * users, [6], heads=1, dim=16, dtype=dtype)
    grad_out = torch.randn(case.rows["q"].shape, dtype=torch.float64).to(dtype)
    exact, want = (_all_at_once(c, grad_out, users) for c in (case.to(torch.float64), case))
    assert_as_right_as(case.run_with_grads(grad_out, impl="fused"), want, exact)


def test_embedding_of_a_prefix_in_others_does_not_change_bits():
    case = make([9, 30], [5], dim=32)
    more = make([9, 30], [7, 5], [1, 1], dim=32)
    for name, rows in case.rows.items():
        more.rows[name] = torch.cat([more.rows[name][:7], rows]) if name.startswith("prefix") else rows
    assert torch.equal(more.run(), case.run())


def _in_child(case, want, answers):
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch's own threads hang in a forked child
    answers.put(all(case.run(impl="fused").numpy().tobytes() == want for _ in range(3)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_works_alone():
    case = make([150] * 20, [16], dim=32)
    torch.set_num_threads(2)
    with torch.no_grad():
        want = case.run(impl="fused").numpy().tobytes()
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(case, want, answers), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert answers.get()
        assert case.run(impl="fused").numpy().tobytes() == want


def test_two_callers_at_once():
    case = make([150] * 10, [16], dim=32)
    torch.set_num_threads(2)
    rows = {n: x.detach() for n, x in case.rows.items()}
    want = ops.prompt_attention(offsets=case.offsets, prefix_offsets=case.prefix_offsets, **rows)
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(ops.prompt_attention, offsets=case.offsets, prefix_offsets=case.prefix_offsets, **rows)
            for _ in range(30)
        ]
        assert all(torch.equal(call.result(), want) for call in calls)
