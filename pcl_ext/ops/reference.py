"""The plain-PyTorch twin of every op: what the kernels must compute. Arguments are checked by the caller."""

import heapq
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS, MOST_CHUNKS = 256, 1024  # csrc/attention_plan.h


def prompt_attention(
    q,
    k,
    v,
    offsets,
    prefix_k=None,
    prefix_v=None,
    prefix_offsets=None,
    prefix_index=None,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """q, k, v [T, H, d], offsets [B + 1], prefix [M, H, d] by prefix_offsets [R + 1], prefix_index [B] -> [T, H, d]."""
    given = [x for x in (q, k, v, prefix_k, prefix_v) if x is not None]
    rows = [x[:0] for x in given]  # nothing to add, but every input takes part in backward
    starts = [0] if prefix_k is None else prefix_offsets.tolist()
    prefix_of = [-1] * (len(offsets) - 1) if prefix_index is None else prefix_index.tolist()
    for (begin, end), prefix in zip(pairwise(offsets.tolist()), prefix_of, strict=True):
        keys, values = k[begin:end], v[begin:end]
        if prefix >= 0:
            shared = slice(starts[prefix], starts[prefix + 1])
            keys, values = torch.cat([prefix_k[shared], keys]), torch.cat([prefix_v[shared], values])
        n, total = end - begin, len(keys)
        mask = torch.ones(n, total, dtype=torch.bool, device=q.device)
        if causal:
            mask = mask.tril(total - n)  # row i sees the whole prefix and own rows <= i
        attended = F.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
        )[0]
        rows.append(attended.transpose(0, 1))
    return torch.cat(rows)


def newest_attention(q, k, v, offsets, prefix_k=None, prefix_v=None, prefix_offsets=None, prefix_index=None) -> Tensor:
    """q [m, H, d] of the newest rows of histories that are not empty, k, v [T, H, d] -> [m, H, d]."""
    newest = offsets[1:][offsets.diff() > 0] - 1
    rows = q.new_zeros(k.shape).index_copy(0, newest, q)
    return prompt_attention(rows, k, v, offsets, prefix_k, prefix_v, prefix_offsets, prefix_index)[newest]


def attention_plan(offsets: Tensor, prefix_offsets: Tensor | None, prefix_index: Tensor | None) -> Tensor:
    """The work list of csrc/attention_plan.h: which runs of histories, grouped by prefix, are worked on together."""
    batch = offsets.shape[0] - 1
    if prefix_offsets is None:
        prefix_offsets, prefix_index = offsets.new_zeros(1), offsets.new_full((batch,), -1)
    length = offsets.diff()
    shared = torch.cat([prefix_offsets.diff(), offsets.new_zeros(1)])[prefix_index]  # index -1: the 0 at the end
    members = torch.argsort(prefix_index, stable=True)
    prefix, rows = prefix_index[members], length[members]
    block = (rows.cumsum(0) - rows) // torch.clamp_min(offsets[-1] // MOST_CHUNKS, CHUNK_ROWS)
    begins = torch.ones(batch, dtype=torch.bool, device=offsets.device)
    begins[1:] = (prefix.diff() != 0) | (block.diff() != 0)
    chunk_begin = begins.nonzero()[:, 0]
    chunks = len(chunk_begin)
    cost = torch.zeros(chunks, dtype=torch.float64, device=offsets.device)
    cost.index_add_(0, begins.cumsum(0) - 1, (length * (2 * shared + length))[members].double())
    order = torch.argsort(cost, descending=True, stable=True)
    numbers = torch.arange(max(batch, prefix_offsets.shape[0]), device=offsets.device)
    prefix_chunk = torch.searchsorted(prefix[chunk_begin], numbers[: prefix_offsets.shape[0]])
    chunk_begin = torch.cat([chunk_begin, offsets.new_full((batch + 1 - chunks,), batch)])
    order = torch.cat([order, numbers[chunks:batch]])
    tail = [members, chunk_begin, order, prefix_chunk, offsets.new_full((1,), chunks)]
    return torch.cat([offsets, prefix_offsets, prefix_index, *tail])


def embed(items, offsets, table, position=None, prompt=None, prompt_index=None) -> Tensor:
    """items [T], table [V + 1, D], position [max_len, D], prompt [K, P, D], prompt_index [B] -> [T, D]."""
    user = _user_of_row(offsets, len(items))
    distance = offsets[1:][user] - 1 - torch.arange(len(items), device=items.device)
    out = F.embedding(items, table)
    if position is not None:
        out = out + F.embedding(distance, position)
    if prompt is not None:
        num_prompts, length, dim = prompt.shape
        which = torch.zeros_like(user) if prompt_index is None else prompt_index[user]
        prompted = (distance < length) & (which >= 0)
        row = torch.where(prompted, which * length + length - 1 - distance, num_prompts * length)
        rows = torch.cat([prompt.flatten(0, 1), prompt.new_zeros(1, dim)])
        out = out + F.embedding(row, rows)
    return out


def linear(x, weight, bias, norm_weight, norm_bias, residual, eps: float) -> Tensor:
    """x [T, D], weight [N, D], bias [N], norm [D], residual [T, N] -> [T, N]."""
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
    out = F.linear(x, weight, bias)
    return out if residual is None else residual + out


def feed_forward(x, norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, eps: float) -> Tensor:
    """x [T, D], norm [D], weight_in [F, D], bias_in [F], weight_out [D, F], bias_out [D] -> [T, D]."""
    hidden = F.gelu(linear(x, weight_in, bias_in, norm_weight, norm_bias, None, eps))
    return linear(hidden, weight_out, bias_out, None, None, x, eps)


def _user_of_row(offsets: Tensor, total: int) -> Tensor:
    """offsets [B + 1] -> [T], the user each packed row belongs to."""
    users = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(users, offsets.diff(), output_size=total)


def to_padded(packed: Tensor, offsets: Tensor, max_seqlen: int, fill: float = 0) -> Tensor:
    """packed [T, ...], offsets [B + 1] -> padded [B, L, ...]."""
    position = torch.arange(max_seqlen, device=packed.device)
    rows = offsets[:-1, None] + position
    used = position < offsets.diff()[:, None]
    padded = packed.new_full((*used.shape, *packed.shape[1:]), fill)
    return padded.index_put(used.nonzero(as_tuple=True), packed[rows[used]])


def to_packed(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """padded [B, L, ...], offsets [B + 1] -> packed [T, ...]."""
    position = torch.arange(padded.shape[1], device=padded.device)
    return padded[position < offsets.diff()[:, None]]


def gather_histories(values: np.ndarray, begin: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """values [E], begin [n] and lengths [n] of the picked histories -> packed [T], offsets [n + 1]."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    shift = np.repeat(begin - offsets[:-1], lengths)
    return torch.from_numpy(np.array(values[np.arange(offsets[-1]) + shift])), torch.from_numpy(offsets)


def plan_batches(cost: Tensor, capacity: int, num_bins: int) -> Tensor | None:
    """cost [n] -> bin [n]: rows, in order, go to the emptiest bin (the first of equals); None if one does not fit."""
    bins = [(0, b) for b in range(num_bins)]
    where = []
    for c in cost.tolist():
        load, b = bins[0]
        if load + c > capacity:
            return None
        heapq.heapreplace(bins, (load + c, b))
        where.append(b)
    return torch.tensor(where, dtype=torch.int64, device=cost.device)


def catalogue_cross_entropy(queries, table, bias, target, seen=None, log_expected=None, older=None) -> Tensor:
    """queries [T, D], table [C, D], bias [C], target [T] -> scalar; see ops.catalogue_cross_entropy."""
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    plain = (queries @ table.T.to(queries.dtype)).to(wide) + bias
    if not len(target):
        return plain.sum()
    own = torch.zeros_like(plain, dtype=torch.bool).scatter(1, target[:, None], True)
    scores = plain if log_expected is None else torch.where(own, plain, plain - log_expected)
    hidden = torch.zeros_like(own)
    for row in range(len(target)):
        held = [] if seen is None else [seen[0][seen[1][row] : row + 1]]
        if older is not None:
            columns, offsets, users = older
            held.append(columns[offsets[users[row]] : offsets[users[row] + 1]])
        for columns in held:
            hidden[row, columns[columns >= 0]] = True
    return F.cross_entropy(scores.masked_fill(hidden, -torch.inf), target)
