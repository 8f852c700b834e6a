"""Ops called without their Python functions' checks, and inside what watches or transforms them."""

import numpy as np
import pytest
import torch
from attention_cases import make

from pcl_ext import ops
from pcl_ext.ops._native import check_devices
from pcl_ext.ops.attention_plan import cuda_list

pytestmark = pytest.mark.needs_ext
OFFSETS = torch.tensor([0, 3, 8])


class Embed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, 16))

    def forward(self, items, offsets):
        return ops.embed(items, offsets, self.table)


def test_an_exported_program_in_half_precision_is_refused():
    items = torch.arange(8)
    exported = torch.export.export(Embed(), (items, OFFSETS)).module()
    torch.testing.assert_close(exported(items, OFFSETS).shape, torch.Size([8, 16]))
    with pytest.raises(TypeError, match="take float32, float64 or bfloat16 throughout, got float16"):
        exported.half()(items, OFFSETS)


def _refused(name, *args, match):
    with pytest.raises(TypeError, match=match), torch.no_grad():
        getattr(torch.ops.pcl_ext, name).default(*args)


def test_dtypes_that_kernels_would_misread_are_refused():
    case, half = make([3, 5], [4], dim=16), "got float16"
    plan = ops.attention_plan(case.offsets, case.prefix_offsets)
    q, k, v, prefix_k, prefix_v = (x.detach() for x in case.rows.values())
    numbers = (plan.batch, plan.num_prefixes, True, 0.25)
    everything = [x.half() for x in (q, k, v, prefix_k, prefix_v)]
    _refused("prompt_attention", *everything, plan.work, *numbers, match=half)
    _refused("prompt_attention", q, k.double(), v, prefix_k, prefix_v, plan.work, *numbers, match="float32, float64")
    _refused("prompt_attention", q, k, v, prefix_k, prefix_v, plan.work.int(), *numbers, match="int64, got int32")
    stats = torch.zeros(8, 2, 2)
    inputs = (q, k, v, prefix_k, prefix_v, plan.work, q, stats, *numbers, [True] * 5)
    _refused("prompt_attention_backward", q.half(), *inputs, match=half)
    items, table = torch.arange(8), torch.randn(9, 16)
    _refused("embed", items.short(), OFFSETS, table, None, None, None, match="int32 or int64, got int16")
    _refused("embed", items, OFFSETS.int(), table, None, None, None, match="int64, got int32")
    _refused("to_padded", table[:8], OFFSETS.int(), 5, 0, match="int64, got int32")
    _refused("to_packed", torch.randn(2, 5, 3), OFFSETS.int(), 8, match="int64, got int32")
    _refused("attention_plan", OFFSETS.int(), None, None, 8, 0, match="int64, got int32")
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    _refused("linear", x.half(), weight.half(), None, None, None, None, 1e-5, match=half)
    _refused("linear", x, weight.double(), None, None, None, None, 1e-5, match="float32, float64")


def test_shapes_that_kernels_would_read_past_are_refused():
    """As a traced program calls them, whose sizes are those of its example."""

    def refused(name, *args, match):
        with pytest.raises(ValueError, match=match), torch.no_grad():
            getattr(torch.ops.pcl_ext, name).default(*args)

    case = make([3, 5], [4], dim=16)
    plan = ops.attention_plan(case.offsets, case.prefix_offsets)
    q, k, v, prefix_k, prefix_v = (x.detach() for x in case.rows.values())
    numbers = (plan.batch, plan.num_prefixes, True, 0.25)
    refused("prompt_attention", q, k, v, prefix_k, prefix_v, plan.work[:-1], *numbers, match="work must be")
    refused("prompt_attention", q, k, v, prefix_k, prefix_v, plan.work, 3, *numbers[1:], match="work must be")
    short = (x[:7] for x in (q, k, v))
    refused("prompt_attention", *short, prefix_k, prefix_v, plan.work, *numbers, match="7 rows .* got 8 and 4")
    fewer = (prefix_k[:3], prefix_v[:3])
    refused("prompt_attention", q, k, v, *fewer, plan.work, *numbers, match="3 rows of prefixes, got 8 and 4")
    refused("prompt_attention", q, k, v[:5], prefix_k, prefix_v, plan.work, *numbers, match="v must be")
    refused("prompt_attention", q[:5], k, v, prefix_k, prefix_v, plan.work, *numbers, match="q must be")
    inputs = (q, k, v, prefix_k, prefix_v, plan.work, q)
    refused("prompt_attention_backward", q[:5], *inputs, torch.zeros(8, 2, 2), *numbers, [True] * 5, match="grad_out")
    refused("prompt_attention_backward", q, *inputs, torch.zeros(7, 2, 2), *numbers, [True] * 5, match="stats must be")
    index = torch.zeros(1, dtype=torch.int64)
    refused("attention_plan", OFFSETS, OFFSETS, index, 8, 8, match="prefix_index must be")
    items, table = torch.arange(8), torch.randn(9, 16)
    refused("embed", items, OFFSETS, table, torch.randn(8, 4), None, None, match="position must be")
    refused("embed", items, OFFSETS, table, None, torch.randn(2, 3, 16), index, match="prompt_index must be")
    refused("to_packed", torch.randn(3, 5, 3), OFFSETS, 8, match="offsets must be")
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    refused("linear", x, weight[:, :9], None, None, None, None, 1e-5, match="weight must be")
    refused("linear", x, weight, None, None, None, torch.randn(7, 4), 1e-5, match="residual must be")
    vector, hidden = torch.ones(16), torch.ones(4)
    wrong = (x, vector, vector, weight, hidden, weight, vector)
    refused("feed_forward", *wrong, 1e-5, match="weight_out must be")
    queries = (torch.randn(8, 16), table, torch.zeros(5), torch.zeros(8, dtype=torch.int64))
    refused("catalogue_cross_entropy", *queries, *[None] * 6, [True] * 3, match="bias must be")


def test_what_cuda_kernels_would_misread_is_refused(cuda):
    """No values are read there: only dtypes and shapes."""

    def refused(name, *args, match):
        with pytest.raises((TypeError, ValueError), match=match), torch.no_grad():
            getattr(torch.ops.pcl_ext, name).default(*args)

    q, k, v, prefix_k, prefix_v = (torch.randn(n, 2, 16, device=cuda) for n in (8, 8, 8, 4, 4))
    offsets, prefix_offsets = OFFSETS.to(cuda), torch.tensor([0, 4], device=cuda)
    work, numbers = cuda_list(offsets, prefix_offsets, None), (2, 1, True, 0.25)
    prefix = (prefix_k, prefix_v)
    out, stats = torch.ops.pcl_ext.prompt_attention.default(q, k, v, *prefix, work, *numbers)
    taken = "take float32, float64, bfloat16 or float16 throughout, got int64"
    refused("prompt_attention", *(x.long() for x in (q, k, v, *prefix)), work, *numbers, match=taken)
    refused("prompt_attention", q, k.half(), v, *prefix, work, *numbers, match="got float16, float32")
    refused("prompt_attention", q, k, v, *prefix, work.int(), *numbers, match="int64, got int32")
    refused("prompt_attention", q, k, v, *prefix, work[:6], *numbers, match="at least 7 numbers .* got shape")
    refused("prompt_attention", q, k, v, None, None, work[:2], 2, 0, True, 0.25, match="at least 3 numbers")
    refused("prompt_attention", q, k[:7], v, *prefix, work, *numbers, match="v must be")
    refused("prompt_attention", q[:5], k, v, *prefix, work, *numbers, match="q must be")
    refused("prompt_attention", q, k, v, prefix_k, prefix_v[..., :8], work, *numbers, match="prefix_v must be")
    inputs, rest = (q, k, v, *prefix, work, out), (*numbers, [True] * 5)
    refused("prompt_attention_backward", q[:5], *inputs, stats, *rest, match="grad_out must be")
    refused("prompt_attention_backward", q, *inputs, stats[:7], *rest, match="stats must be")
    refused("prompt_attention_backward", q, *inputs, stats.half(), *rest, match="stats must be float32, got float16")
    items, table, index = torch.arange(8, device=cuda), torch.randn(9, 16, device=cuda), offsets[:1]
    refused("embed", items, offsets, table, table[:, :4], None, None, match="position must be")
    refused("embed", items, offsets, table, None, table.expand(2, 9, 16), index, match="prompt_index must be")
    refused("embed_backward", q[:, 0, :8], items, offsets, table, None, None, None, [True] * 3, match="grad_out must")
    refused("to_padded", table[:8], offsets.int(), 5, 0, match="int64, got int32")
    refused("to_packed", torch.randn(3, 5, 3, device=cuda), offsets, 8, match="offsets must be")


def test_a_work_list_may_have_strides():
    case = make([3, 5], [4], dim=16)
    work = ops.attention_plan(case.offsets, case.prefix_offsets).work
    apart = torch.stack([work, torch.full_like(work, -1)], 1)[:, 0]
    q, *others = (x.detach() for x in case.rows.values())
    for name, asked, rest in (("prompt_attention", q, (True, 0.25)), ("newest_attention", q[[2, 7]], (0.25,))):
        op = getattr(torch.ops.pcl_ext, name).default
        got, want = (op(asked, *others, x, 2, 1, *rest) for x in (apart, work))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_tensors_of_several_devices_are_refused():
    check_devices(OFFSETS, None, 3)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        check_devices(OFFSETS, None, OFFSETS.to("meta"), 3)


def _in_bfloat16():
    """As what is kept for backward is made smaller, and by mistake not widened again."""
    smaller = torch.autograd.graph.saved_tensors_hooks
    return smaller(lambda x: x.bfloat16() if x.is_floating_point() else x, lambda x: x)


def test_what_hooks_give_back_in_another_dtype_is_refused():
    q, k, v = torch.randn(3, 8, 2, 16, dtype=torch.bfloat16).unbind()
    q = q.clone().requires_grad_()
    with _in_bfloat16():
        out = ops.prompt_attention(q, k, v, OFFSETS, impl="fused")
    with pytest.raises(TypeError, match="stats must be float32, got bfloat16: hooks of saved tensors"):
        out.sum().backward()
    x = torch.randn(8, 16, requires_grad=True)
    vector, weight, hidden = torch.ones(16), torch.randn(4, 16), torch.ones(4)
    with _in_bfloat16():
        out = ops.feed_forward(x, (vector, vector), weight, hidden, weight.T.contiguous(), vector, impl="fused")
    with pytest.raises(TypeError, match="grad_out must have x's dtype, got float32 and bfloat16"):
        out.sum().backward()


def test_half_a_norm_is_refused():
    x, weight, norm = torch.randn(8, 16), torch.randn(4, 16), torch.ones(16)
    for parts in ((norm, None), (None, norm)):
        with pytest.raises(ValueError, match="norm_weight and norm_bias come together or not at all"):
            torch.ops.pcl_ext.linear.default(x, weight, None, *parts, None, 1e-5)


def _gradients(run, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad((torch.vmap(run)(*leaves) ** 2).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("name", ["embed", "linear", "prompt_attention", "newest_attention", "to_padded", "to_packed"])
@pytest.mark.filterwarnings("ignore:.*batching rule.*:UserWarning")
def test_vmap_over_models_keeps_every_gradient(name):
    """A tensor inside vmap says that it asks for no gradient."""
    own, prefix = torch.randn(2, 8, 2, 16), torch.randn(2, 4, 2, 16)
    offsets, prefix_offsets, items = OFFSETS, torch.tensor([0, 4]), torch.arange(8)
    runs = {
        "embed": ((torch.randn(2, 9, 16),), lambda impl, t: ops.embed(items, offsets, t, impl=impl)),
        "linear": (
            (torch.randn(2, 8, 16), torch.randn(2, 4, 16)),
            lambda impl, x, w: ops.linear(x, w, impl=impl),
        ),
        "prompt_attention": (
            (own, own + 1, own - 1, prefix, prefix + 1),
            lambda impl, q, k, v, a, b: ops.prompt_attention(q, k, v, offsets, a, b, prefix_offsets, impl=impl),
        ),
        "newest_attention": (
            (own[:, [2, 7]], own + 1, own - 1, prefix, prefix + 1),
            lambda impl, q, k, v, a, b: ops.newest_attention(q, k, v, offsets, a, b, prefix_offsets, impl=impl),
        ),
        "to_padded": ((own,), lambda impl, x: ops.to_padded(x, offsets, 5, impl=impl)),
        "to_packed": ((torch.randn(2, 2, 5, 3),), lambda impl, x: ops.to_packed(x, offsets, 8, impl=impl)),
    }
    inputs, run = runs[name]
    want = _gradients(lambda *x: run("reference", *x), *inputs)
    found = _gradients(lambda *x: run("auto", *x), *inputs)
    assert all(g is not None for g in found)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_saved_tensors_may_come_back_laid_out_anew():
    case = make([3, 5], [4], dim=16)
    want = case.run_with_grads(torch.ones(case.rows["q"].shape), impl="fused")

    def pack(x):
        return x.transpose(0, 1).contiguous() if x.dim() == 3 else x

    def unpack(x):
        return x.transpose(0, 1) if x.dim() == 3 else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = case.run_with_grads(torch.ones(case.rows["q"].shape), impl="fused")
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_a_feed_forward_without_hidden_features_passes_the_gradient_on():
    x, ones, zeros = torch.randn(5, 16, requires_grad=True), torch.ones(16), torch.zeros(16)
    out = ops.feed_forward(x, (ones, zeros), torch.empty(0, 16), torch.empty(0), torch.empty(16, 0), zeros)
    assert torch.equal(torch.autograd.grad(out, x, torch.ones_like(out))[0], torch.ones(5, 16))


def test_a_total_that_cannot_be_asks_for_no_memory():
    with pytest.raises(ValueError, match="offsets must .* total = 10000000000, got 8"):
        ops.to_packed(torch.randn(2, 5, 3), OFFSETS, 10**10)


def test_a_plan_beside_offsets_of_another_type():
    case = make([3, 5], dim=16)
    plan, rows = ops.attention_plan(case.offsets), (case.rows[name] for name in "qkv")
    with pytest.raises(TypeError, match="offsets must be a Tensor"):
        ops.prompt_attention(*rows, [0, 3, 8], plan=plan)


def test_numbers_that_lie_across_words_are_copied_first():
    stored = np.frombuffer(b"x" + np.arange(3, 11).tobytes(), np.int64, offset=1)
    items, offsets = ops.gather_histories(stored, np.array([0, 3, 8]), np.array([1]), 9)
    assert items.tolist() == [6, 7, 8, 9, 10]
