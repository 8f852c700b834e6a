"""The emulation of CUDA on the CPU: it computes what a warp would, and notices what a GPU would not forgive."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from embed_cases import make, with_grads

from pcl_ext import ops
from pcl_ext.ops import _gpu, _native

pytestmark = pytest.mark.skipif(find_spec("pcl_ext._cuda_emulated") is None, reason="the emulation is not built")

MISTAKES = {
    "one warp at a barrier": "thread 32 .* is at sync_threads .* while thread 0 is at its end",
    "lanes apart": "is at shuffle .* while thread 0 is at ballot",
    "early end": "thread 40 .* is at its end .* while thread 32 is at sync_threads",
    "copy not waited for": "thread 0 .* ends without waiting for its copies",
    "copy past the end": "gives cp_async an address outside shared memory: byte 64 of 64",
    "copy not aligned": "gives cp_async a source that is not aligned to 16",
    "write past the end": "AddressSanitizer: heap-buffer-overflow",
    "part of a warp": "a block must be whole warps, got 40 threads",
}
MODULE = find_spec("pcl_ext._cuda_emulated")
RUN = """
import ctypes
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("pcl_ext._cuda_emulated", {path!r})  # alone: torch takes seconds to load
emulated = module_from_spec(spec)
spec.loader.exec_module(emulated)
source = ctypes.create_string_buffer(96)
emulated.make_mistake({number}, (ctypes.addressof(source) + 15) // 16 * 16)
"""


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_abort(name):
    if name == "write past the end" and not hasattr(_native.C, "overflow_an_int"):
        pytest.skip("the compiled module is not built with PCL_SANITIZE")
    script = RUN.format(path=MODULE.origin, number=list(MISTAKES).index(name))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode != 0, "the mistake was not seen"
    assert re.search(MISTAKES[name], result.stderr), result.stderr


def product(dtype, transposed, *, wait=True):
    """a [16, 16] b, of the emulated warp and of torch in float64."""
    from pcl_ext import _cuda_emulated

    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), float("nan"))
    given = b if transposed else b.t().contiguous()
    pointers = [x.data_ptr() for x in (a, given, c)]
    assert _cuda_emulated.product(*pointers, _native.SCALARS[dtype], transposed, wait) == 0
    return c, a.double() @ b.double()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fragments_lie_as_the_instruction_reads_them(dtype, transposed):
    got, want = product(dtype, transposed)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_copy_nobody_waits_for_has_not_happened():
    got, _ = product(torch.bfloat16, False, wait=False)
    assert got.isnan().all()


def test_the_order_of_threads_shows_a_race():
    from pcl_ext import _cuda_emulated

    seen = []
    for order in (0, 1):
        _cuda_emulated.set_order(order)
        out = torch.full((64,), -7, dtype=torch.int32)
        assert _cuda_emulated.race(out.data_ptr()) == 0
        seen.append(out)
    _cuda_emulated.set_order(0)
    assert not torch.equal(*seen)
    assert (seen[0][32:] == torch.arange(31, -1, -1)).all()


@pytest.mark.parametrize("order", [1, 7])
def test_results_do_not_depend_on_the_order_of_threads(order):
    lengths = [30, 5, 0, 40] * 20
    arguments = make(lengths, dim=20)
    packed, offsets = torch.randn(sum(lengths), 20), arguments["offsets"]
    grad_out, seen = torch.randn(sum(lengths), 20), []
    for each in (0, order):
        with _gpu.emulated(each):
            padded = ops.to_padded(packed, offsets, 40, impl="fused")
            back = ops.to_packed(padded, offsets, len(packed), impl="fused")
            seen.append({"padded": padded, "back": back, **with_grads(arguments, grad_out, impl="fused")})
    torch.testing.assert_close(*seen, rtol=0, atol=0)
