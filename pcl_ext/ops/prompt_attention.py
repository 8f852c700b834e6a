"""prompt_attention: packed histories attend to shared prefixes and to themselves."""

import torch
from torch import Tensor

from pcl_ext.ops import _gpu, prompt_attention_op, reference
from pcl_ext.ops._check import FLOATS, autocast, check_like, check_shape, check_tensor, is_plain, reads_values
from pcl_ext.ops._gpu import runs_cuda
from pcl_ext.ops._native import SCALARS, call, use_fused
from pcl_ext.ops.attention_plan import (
    AttentionPlan,
    check_layout,
    check_values,
    cuda_list,
    resolve_prefix_index,
    work_list,
)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_offsets: Tensor | None = None,
    prefix_index: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend over ragged histories with shared prefixes: q, k, v [T, H, d], offsets [B + 1] int64 -> [T, H, d].

    prefix_k, prefix_v [M, H, d] are packed by prefix_offsets [R + 1] int64; prefix_index [B] int64 says which prefix a
    history sees (-1 none), and may be left out when R == 1 (all see it) or R == B (each sees its own). Row i of history
    b attends to all of prefix_index[b] and to rows <= i of b (all rows of b when causal is False). scale multiplies the
    scores, 1 / sqrt(d) by default. plan is what attention_plan(offsets, prefix_offsets, prefix_index) returned.
    On CUDA the kernels take float32, bfloat16 and float16 in head widths that are multiples of 16 up to 128, or to 80
    (float32) and 112 on GPUs with 99 KB of shared memory a block. They do not check the offsets' values: rows
    before the first and after the last are 0 and get no gradient, so that a captured graph may have rows to spare.
    Under autocast, float32 tensors are cast to its dtype. Raises ValueError or TypeError naming what is wrong.
    """
    q, k, v, prefix_k, prefix_v = autocast(q, k, v, prefix_k, prefix_v)
    if not fits_plan(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, prefix_index, plan):
        _check_rows(q, k, v, prefix_k, prefix_v, prefix_offsets, prefix_index)
        check_layout(offsets, prefix_offsets, prefix_index, "q", q)
        if plan is not None:
            check_plan(plan, offsets, prefix_offsets, prefix_index, q, prefix_k)
            if torch.compiler.is_compiling() and q.is_cpu and not is_of(plan, offsets, prefix_offsets, prefix_index):
                plan = None  # values could not be compared: it is made anew
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    prefix_total = 0 if prefix_k is None else prefix_k.shape[0]
    if not use_fused_width(impl, q):
        index = resolve_prefix_index(offsets, prefix_offsets, prefix_index)
        if plan is None:
            check_values(offsets, prefix_offsets, index, q.shape[0], prefix_total)
        return reference.prompt_attention(
            q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, index, causal=causal, scale=scale
        )
    if plan is not None:
        work, batch, num_prefixes = plan.work, plan.batch, plan.num_prefixes
    else:
        if runs_cuda(q):
            learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (prefix_k, prefix_v))
            work = cuda_list(offsets, prefix_offsets, prefix_index, backward=learns)
        else:
            work = work_list(offsets, prefix_offsets, prefix_index, q.shape[0], prefix_total)
        batch = offsets.shape[0] - 1
        num_prefixes = 0 if prefix_offsets is None else prefix_offsets.shape[0] - 1
    inputs = (q, k, v, prefix_k, prefix_v, work, batch, num_prefixes, causal, scale)
    return call(torch.ops.pcl_ext.prompt_attention.default, prompt_attention_op.output, *inputs)[0]


def use_fused_width(impl: str, q: Tensor) -> bool:
    """use_fused, for the head widths that the kernels take."""
    fused, dim = use_fused(impl, q, cuda=_gpu.FLOATS), q.shape[2]
    if not fused or not runs_cuda(q):
        return fused
    taken = dim % 16 == 0 and dim <= 128
    if taken and _gpu.attention_fits(q.device.index, dim, SCALARS[q.dtype]):
        return True
    if impl == "fused" and not taken:
        raise ValueError(f"impl='fused' takes head widths d that are multiples of 16 up to 128 on CUDA, got {dim}")
    if impl == "fused":
        raise ValueError(
            f"impl='fused' takes a head width d of {dim} in {str(q.dtype)[6:]} on GPUs with more shared memory a block "
            f"than {q.device} has"
        )
    return False


def is_of(plan: AttentionPlan, offsets, prefix_offsets, prefix_index) -> bool:
    """Whether plan was made from these very tensors."""
    same_index = plan.index_left_out if prefix_index is None else prefix_index is plan.prefix_index
    return offsets is plan.offsets and prefix_offsets is plan.prefix_offsets and same_index


def fits_plan(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, prefix_index, plan) -> bool:
    """Whether plan was made from these very offsets and prefixes, which were checked then, and the rows fit it.

    No means that the checks below have to look.
    """
    if torch.compiler.is_compiling() or type(plan) is not AttentionPlan or not is_plain(q, 3, FLOATS):
        return False
    if not is_of(plan, offsets, prefix_offsets, prefix_index) or not offsets.is_cpu:
        return False
    shape, dtypes = q.shape, (q.dtype,)
    if not (is_plain(k, 3, dtypes) and is_plain(v, 3, dtypes) and shape == k.shape and shape == v.shape):
        return False
    total, num_heads, dim = shape
    if total != plan.total or dim == 0:
        return False
    if prefix_offsets is None:
        return prefix_k is None and prefix_v is None and prefix_index is None
    return (
        is_plain(prefix_k, 3, dtypes)
        and is_plain(prefix_v, 3, dtypes)
        and prefix_k.shape == prefix_v.shape == (plan.prefix_total, num_heads, dim)
    )


def _check_rows(q, k, v, prefix_k, prefix_v, prefix_offsets, prefix_index) -> None:
    check_tensor("q", q, 3, FLOATS)
    check_head_width(q)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, 3)
        check_like(name, value, "q", q)
        check_shape(name, value, q.shape, "[T, H, d]")
    check_prefix(q, prefix_k, prefix_v, prefix_offsets, prefix_index)


def check_head_width(q: Tensor) -> None:
    if q.shape[2] == 0:
        raise ValueError(f"q must have a head width d of at least 1, got shape {tuple(q.shape)}")


def check_prefix(q, prefix_k, prefix_v, prefix_offsets, prefix_index) -> None:
    """All of a prefix or nothing, and its rows like those of q [T, H, d]."""
    parts = {"prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_offsets": prefix_offsets}
    missing = [name for name, value in parts.items() if value is None]
    if len(missing) == 3:
        if prefix_index is not None:
            raise ValueError("prefix_index needs a prefix, got prefix_index without prefix_k, prefix_v, prefix_offsets")
        return
    if missing:
        raise ValueError(
            f"prefix_k, prefix_v and prefix_offsets come together or not at all, got no {', no '.join(missing)}"
        )
    for name, value in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        check_tensor(name, value, 3)
        check_like(name, value, "q", q)
        check_shape(name, value, (prefix_k.shape[0], *q.shape[1:]), "[M, H, d]")


def check_plan(plan, offsets, prefix_offsets, prefix_index, q, prefix_k, like: str = "q") -> None:
    """like: what q, whose rows histories are packed in, is called."""
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must be an AttentionPlan, got {type(plan).__name__}")
    check_like("plan", plan.work, like, q, dtype=False)
    pairs = [("offsets", offsets, plan.offsets), ("prefix_offsets", prefix_offsets, plan.prefix_offsets)]
    if prefix_offsets is not None and not (prefix_index is None and plan.index_left_out):
        index = resolve_prefix_index(offsets, prefix_offsets, prefix_index)
        pairs.append(("prefix_index", index, plan.prefix_index))
    for name, given, planned in pairs:
        if given is planned:
            continue
        same = given is not None and planned is not None and given.shape == planned.shape
        if not same or (reads_values(given) and not torch.equal(given, planned)):
            raise ValueError(f"plan must be made from the same {name}, got a plan of other {name}")
    if plan.total is None and runs_cuda(q):  # made there, and unread
        return
    if plan.total != q.shape[0]:
        raise ValueError(f"offsets must end at len({like}) = {q.shape[0]}, got {plan.total}")
    if prefix_k is not None and plan.prefix_total != prefix_k.shape[0]:
        raise ValueError(f"prefix_offsets must end at len(prefix_k) = {prefix_k.shape[0]}, got {plan.prefix_total}")
