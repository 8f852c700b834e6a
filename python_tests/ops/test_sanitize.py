"""`make sanitize` would see a bug: deliberate ones, each in a process of its own, are reported."""

import subprocess
import sys
from pathlib import Path

import pytest

from pcl_ext import ops
from pcl_ext.ops import _native

pytestmark = pytest.mark.skipif(
    not hasattr(_native.C, "overflow_an_int"), reason="the compiled module is not built with PCL_SANITIZE"
)
ISAS = range(len(_native.C.isas())) if ops.has_fused() else []
SHORT = """
from attention_cases import make
case = make([40, 30], dim=16)
case.rows[{name!r}] = case.rows[{name!r}].detach()[:-1].clone()
case.run_isa(case.rows["q"].detach().clone(), {isa})
"""


def report_of(script: str) -> str:
    """What a script wrote to stderr; it must not have lived."""
    here = Path(__file__).parent  # where a script finds attention_cases, and no package but the one that is tested
    result = subprocess.run([sys.executable, "-c", script], cwd=here, capture_output=True, text=True, check=False)
    assert result.returncode != 0, "the bug was not seen"
    return result.stderr


def test_reading_past_a_tensor():
    report = report_of(
        "import torch; from pcl_ext.ops._native import C; x = torch.zeros(99); C.read_past_the_end(x.data_ptr(), 99)"
    )
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert "read_past_the_end" in report


def test_overflowing_an_int():
    report = report_of("import torch; from pcl_ext.ops._native import C; C.overflow_an_int(2**31 - 1)")
    assert "runtime error: signed integer overflow" in report


def test_emulated_cuda_kernels_are_watched():
    report = report_of("""
import torch
from pcl_ext import _cuda_emulated
packed, offsets, padded = torch.zeros(4, 3), torch.tensor([0, 5]), torch.zeros(1, 6, 3)
_cuda_emulated.to_padded(packed.data_ptr(), offsets.data_ptr(), 0, padded.data_ptr(), 1, 6, 5, 12, 12, 0)
""")
    assert "AddressSanitizer: heap-buffer-overflow" in report
    assert "to_padded_kernel" in report


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_of_every_instruction_set_are_watched(isa, name):
    report = report_of(SHORT.format(name=name, isa=isa))
    assert "AddressSanitizer" in report
    assert "READ of size" in report
