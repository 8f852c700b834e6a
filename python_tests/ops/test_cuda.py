"""What only a GPU can show: no waiting for the device, CUDA graphs, streams, torch.compile, several devices."""

import pytest
import torch
from attention_cases import to_offsets

from pcl_ext import ops

pytestmark = pytest.mark.gpu
LENGTHS = [5, 0, 40, 9, 1]


def embed(rows):
    """rows [T, 8] as the positions and, some of them, as a prompt."""
    offsets = to_offsets(LENGTHS).cuda()
    items, table = torch.arange(rows.shape[0], device="cuda") % 7, rows[:7].clone()
    return Call(lambda x: ops.embed(items, offsets, table, x[:50], x[None, :4], impl="fused"), rows)


def to_padded(rows):
    """rows [T, 8] as they are."""
    offsets = to_offsets(LENGTHS).cuda()
    return Call(lambda x: ops.to_padded(x, offsets, 40, 1, impl="fused"), rows)


def to_packed(rows):
    """rows [T, 8] seen as a padded block, all histories as long as it."""
    padded, offsets = rows[:54].reshape(6, 9, 8), to_offsets([9] * 6).cuda()
    return Call(lambda x: ops.to_packed(x, offsets, 54, impl="fused"), padded)


class Call:
    """An op as a function of one tensor, and that tensor."""

    def __init__(self, run, x):
        self.run, self.x = run, x.detach().clone().requires_grad_()

    def with_grad(self):
        """out and its gradient, summed with weights that differ."""
        out = self.run(self.x)
        weights = torch.arange(out.numel(), device="cuda", dtype=torch.float32).view(out.shape).cos()
        return out, torch.autograd.grad((out * weights).sum(), self.x)[0]


CALLS = {"embed": embed, "to_padded": to_padded, "to_packed": to_packed}


@pytest.fixture(params=CALLS)
def call(request):
    """Each op, with inputs on the GPU."""
    return CALLS[request.param](torch.randn(sum(LENGTHS), 8, device="cuda"))


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_nothing_waits_for_the_device(call):
    call.with_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.with_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_with_new_numbers(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call.with_grad()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.with_grad()
    with torch.no_grad():
        call.x.copy_(torch.randn_like(call.x))
    graph.replay()
    torch.testing.assert_close(got, call.with_grad(), rtol=0, atol=0)


def test_a_second_stream(call):
    want, stream = call.with_grad(), torch.cuda.Stream()
    late = torch.full_like(call.x, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms, so that a launch on another stream would read NaN
        late.copy_(call.x.detach())
        got = call.run(late)
    stream.synchronize()
    assert torch.equal(got, want[0])


def test_compiles_as_one_graph(call):
    def step(x):
        return call.run(2 * x).square().sum()

    want = torch.autograd.grad(step(call.x), call.x)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(call.x), call.x)[0]
    torch.testing.assert_close(got, want)


def test_autocast_leaves_layouts_alone(call):
    want = call.with_grad()
    with torch.autocast("cuda", torch.bfloat16):
        got = call.with_grad()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_same_bits_every_run(call):
    want = call.with_grad()
    for _ in range(5):
        torch.testing.assert_close(call.with_grad(), want, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current():
    packed, offsets = torch.randn(9, 4, device="cuda:1"), to_offsets([5, 4]).to("cuda:1")
    assert torch.cuda.current_device() == 0
    got = ops.to_padded(packed, offsets, 5, impl="fused")
    assert torch.equal(got, ops.to_padded(packed, offsets, 5, impl="reference"))
