"""Prefix sharing equals the naive computation: prompts as tokens of every user, and every task run alone."""

import pytest
import torch
from attention_cases import IMPLS, as_right_as, make, to_offsets

from pcl_ext import ops


def naive_prompts(case, causal=True):
    """Prompt rows copied in front of every user that has some; their own queries are not asked for."""
    prefix_of = case.prefix_index.tolist()
    k, v, q, outs = *(case.rows[n] for n in ("k", "v", "q")), []
    for b, r in enumerate(prefix_of):
        own = slice(case.offsets[b], case.offsets[b + 1])
        shared = slice(case.prefix_offsets[r], case.prefix_offsets[r + 1]) if r >= 0 else slice(0, 0)
        keys, values = (torch.cat([case.rows[p][shared], x[own]]) for p, x in (("prefix_k", k), ("prefix_v", v)))
        queries = torch.cat([keys.new_zeros(len(keys) - len(q[own]), *q.shape[1:]), q[own]])
        tokens = ops.prompt_attention(queries, keys, values, to_offsets([len(keys)]), causal=causal, impl="reference")
        outs.append(tokens[len(keys) - len(q[own]) :])
    return torch.cat(outs)


@pytest.mark.parametrize("impl", IMPLS)
def test_prompts_of_tasks_read_once(impl):
    case = make([5, 33, 1, 18, 9], [16, 4], [0, 1, -1, 0, 1], dim=32)
    exact_case = case.to(torch.float64)
    rows, exact_rows = list(case.rows.values()), list(exact_case.rows.values())
    out, naive, exact = case.run(impl=impl), naive_prompts(case), naive_prompts(exact_case)
    grad_out = torch.randn(out.shape)
    as_right_as(out, naive, exact)
    for got, want, right in zip(
        torch.autograd.grad(out, rows, grad_out),
        torch.autograd.grad(naive, rows, grad_out),
        torch.autograd.grad(exact, exact_rows, grad_out.double()),
    ):
        as_right_as(got, want, right)


def tails_on_trunks(q, k, v, offsets, tail_rows, num_tasks, impl):
    """q, k, v [K, T, H, d]: K versions of users, other in the last rows only. The trunk is a prefix of the tails."""
    lengths = offsets.diff()
    tails = lengths.clamp(max=tail_rows)
    row = torch.arange(int(offsets[-1]))
    user = torch.repeat_interleave(lengths)
    is_tail = row >= (offsets[1:] - tails)[user]
    trunk_offsets, tail_offsets = to_offsets((lengths - tails).tolist()), to_offsets(tails.repeat(num_tasks).tolist())
    trunk_k, trunk_v = k[0][~is_tail], v[0][~is_tail]
    index = torch.arange(len(lengths)).repeat(num_tasks)
    q_tail, k_tail, v_tail = (x[:, is_tail].flatten(0, 1) for x in (q, k, v))
    out = ops.prompt_attention(q_tail, k_tail, v_tail, tail_offsets, trunk_k, trunk_v, trunk_offsets, index, impl=impl)
    trunk = ops.prompt_attention(q[0][~is_tail], trunk_k, trunk_v, trunk_offsets, impl=impl)
    whole = torch.empty(q.shape)
    whole[:, is_tail], whole[:, ~is_tail] = out.unflatten(0, (num_tasks, -1)), trunk
    return whole


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail_rows", [1, 4])
def test_many_tasks_share_a_users_trunk(impl, tail_rows):
    num_tasks, offsets = 3, to_offsets([9, 2, 30, 4, 0])  # users of at most tail_rows events have an empty trunk
    total = int(offsets[-1])
    exact = torch.randn(3, 1, total, 2, 16, dtype=torch.float64).repeat(1, num_tasks, 1, 1, 1)
    lengths = offsets.diff()
    user = torch.repeat_interleave(lengths)
    is_tail = torch.arange(total) >= (offsets[1:] - tail_rows)[user]
    exact[:, :, is_tail] += torch.randn(3, num_tasks, int(is_tail.sum()), 2, 16)
    rows = exact.float()
    shared = tails_on_trunks(*rows, offsets, tail_rows, num_tasks, impl)
    for task in range(num_tasks):
        alone = ops.prompt_attention(*rows[:, task], offsets, impl="reference")
        right = ops.prompt_attention(*exact[:, task].float().double(), offsets, impl="reference")
        as_right_as(shared[task], alone, right)


@pytest.mark.parametrize("impl", IMPLS)
def test_new_events_continue_a_known_history(impl):
    case = make([12, 7, 20], dim=32)
    q, k, v = (case.rows[n].detach() for n in ("q", "k", "v"))
    new = torch.tensor([2, 7, 1])
    is_new = torch.arange(39) >= (case.offsets[1:] - new)[torch.repeat_interleave(case.offsets.diff())]
    got = ops.prompt_attention(
        *(x[is_new] for x in (q, k, v)),
        to_offsets(new.tolist()),
        k[~is_new],
        v[~is_new],
        to_offsets((case.offsets.diff() - new).tolist()),
        impl=impl,
    )
    exact = ops.prompt_attention(q.double(), k.double(), v.double(), case.offsets, impl="reference")
    as_right_as(got, ops.prompt_attention(q, k, v, case.offsets, impl="reference")[is_new], exact[is_new])
