"""The compiled module: missing is fine, broken is loud; it computes on torch's threads."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import make
from torch._subclasses import FakeTensorMode

import pcl_ext
from pcl_ext import ops
from pcl_ext.ops import _gpu, _native

PACKAGE = Path(pcl_ext.__file__).parent


def run_with_module(tmp_path, module: str | None, script: str, name: str = "_C") -> subprocess.CompletedProcess:
    """Run script on a copy of the ops whose modules are missing, but for `name`, which holds the text given."""
    package = tmp_path / "pcl_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops").symlink_to(PACKAGE / "ops")
    if module is not None:
        (package / f"{name}.py").write_text(module)
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    return subprocess.run([sys.executable, "-c", f"{path}\n{script}"], capture_output=True, text=True, check=False)


def test_missing_is_fine(tmp_path):
    script = """
import torch
from pcl_ext import ops
assert not ops.has_fused()
print(ops.native_status())
offsets = torch.tensor([0, 3, 5])
q = torch.randn(5, 2, 4, requires_grad=True)
ops.prompt_attention(q, q, q, offsets, plan=ops.attention_plan(offsets)).sum().backward()
ops.embed(torch.arange(5), offsets, torch.randn(5, 3))
ops.to_packed(ops.to_padded(q, offsets, 4), offsets, 5)
ops.gather_histories(torch.arange(5), offsets, torch.tensor([1]), 2)
ops.plan_batches(torch.tensor([1, 2]), 2)
try:
    ops.to_padded(q, offsets, 4, impl="fused")
except RuntimeError as error:
    print(error)
"""
    result = run_with_module(tmp_path, None, script)
    assert result.returncode == 0, result.stderr
    assert "not built: every op runs on its PyTorch reference" in result.stdout
    assert "impl='fused' needs the compiled module" in result.stdout


def test_broken_is_loud(tmp_path):
    result = run_with_module(tmp_path, "raise ImportError('undefined symbol: pcl')", "import pcl_ext.ops")
    assert result.returncode != 0
    assert "undefined symbol: pcl" in result.stderr


CUDA_TORCH = "import torch; torch.version.cuda = {cuda}; torch.backends.cuda.is_built = lambda: True\n"  # as of ROCm
MODULE = "compiler = lambda: 'nvcc 99'; refusal = lambda: {}; error_text = lambda number: 'unknown'"


@pytest.mark.parametrize(
    ("cuda", "module", "says"),
    [
        (None, None, "not built: this torch .* has no CUDA"),
        (None, "raise ImportError('not to be loaded')", "built, not loaded: this torch .* has no CUDA"),
        ("99.0", None, "not built: ops on CUDA tensors run on their PyTorch reference"),
        ("99.0", MODULE.format(0), r"_cuda.py, nvcc 99, no CUDA device$"),
        ("99.0", MODULE.format(35), r"no CUDA device \(CUDA error 35, the NVIDIA driver is missing or older than"),
        ("99.0", MODULE.format(100), r"_cuda.py, nvcc 99, no CUDA device \(CUDA error 100, unknown\)$"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_status_of_the_cuda_module(tmp_path, cuda, module, says):
    script = CUDA_TORCH.format(cuda=repr(cuda)) + "from pcl_ext import ops; print(ops.native_status('cuda'))"
    result = run_with_module(tmp_path, module, script, "_cuda")
    assert result.returncode == 0, result.stderr
    assert re.search(says, result.stdout.strip())


@pytest.mark.parametrize(
    ("error", "says"), [(0, "nvcc 99, on GPU"), (209, "nvcc 99, cannot run on GPU (sm_90) (CUDA error 209, no code)")]
)
def test_status_says_where_a_device_cannot_run_the_kernels(error, says, monkeypatch):
    answers = {"compiler": lambda: "nvcc 99", "refusal": lambda: error, "error_text": lambda number: "no code"}
    monkeypatch.setattr(_gpu, "CUDA", SimpleNamespace(__file__="_cuda.so", **answers))
    monkeypatch.setattr(_gpu, "_TORCH_HAS_CUDA", True)
    monkeypatch.setattr(_gpu, "_is_new_enough", lambda device: True)
    there = {"is_available": True, "get_device_name": "GPU", "get_device_capability": (9, 0), "current_device": 0}
    for name, answer in there.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    assert says in _gpu.cuda_status()


def test_a_broken_cuda_module_is_loud(tmp_path):
    script = CUDA_TORCH.format(cuda="'99.0'") + "import pcl_ext.ops"
    result = run_with_module(tmp_path, "raise ImportError('undefined symbol: cuda')", script, "_cuda")
    assert result.returncode != 0
    assert "undefined symbol: cuda" in result.stderr


@pytest.mark.skipif(_gpu.CUDA is not None, reason="pcl_ext._cuda is there")
def test_cuda_tensors_without_the_module():
    with FakeTensorMode():
        packed, offsets = torch.empty(5, 4, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
        with pytest.raises(RuntimeError, match="impl='fused' needs the compiled module pcl_ext._cuda, which is "):
            ops.to_padded(packed, offsets, 4, impl="fused")
        with pytest.raises(TypeError, match="takes cpu tensors of .* got float32 on cuda"):
            ops.linear(packed, torch.empty(3, 4, device="cuda"), impl="fused")
        assert ops.linear(packed, torch.empty(3, 4, device="cuda")).device.type == "cuda"


@pytest.mark.needs_ext
def test_status_names_the_module_and_what_runs():
    status = ops.native_status()
    assert "_C" in status
    assert "baseline" in status
    assert "using" in status


@pytest.mark.needs_ext
def test_threads_sleep_between_calls():
    torch.set_num_threads(3)
    case = make([150] * 10, [16], dim=32)
    case.run(impl="fused")
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


SHARED_THREADS = """
import os, torch
from pcl_ext import ops
torch.set_num_threads(1)
packed, offsets = torch.ones(60_000, 16), torch.arange(0, 60_001, 10)
torch.set_num_threads(3)
print(len(os.listdir("/proc/self/task")))
ops.to_padded(packed, offsets, 10)
print(len(os.listdir("/proc/self/task")))
packed.relu()
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.needs_ext
def test_ops_and_torch_share_threads():
    result = subprocess.run([sys.executable, "-c", SHARED_THREADS], capture_output=True, text=True, check=True)
    alone, ours, with_torch = (int(line) for line in result.stdout.split())
    assert ours == alone + 2
    assert with_torch == ours


@pytest.mark.needs_ext
def test_one_thread_alone_is_said(monkeypatch):
    assert "one thread" not in ops.native_status()
    monkeypatch.setattr(_native, "C", SimpleNamespace(**vars(_native.C) | {"has_threads": lambda: False}))
    assert "one thread alone (no OpenMP was found in torch), instruction sets" in ops.native_status()


@pytest.mark.needs_ext
def test_all_threads_count_denormal_numbers_alike():
    """Each thread of a processor has a mode of its own; torch's others do as the caller does, and go back to theirs."""
    rows, offsets = torch.full((20_000, 64), 1e-40), torch.arange(0, 20_001, 100)
    position = torch.zeros(100, 64)
    torch.set_num_threads(3)
    items = torch.arange(20_000)
    assert (ops.embed(items, offsets, rows, position) > 0).all()
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        for _ in range(5):
            assert ((ops.embed(items, offsets, rows, position) == 0) == flush).all()


@pytest.mark.needs_ext
def test_a_tensor_of_zeros_that_lies_nowhere():
    zeros = torch._efficientzerotensor((5, 2, 16))
    out = ops.prompt_attention(zeros, zeros, zeros, torch.tensor([0, 2, 5]))
    assert torch.equal(out, torch.zeros(5, 2, 16))


def test_sources_are_not_called_an_install(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").touch()
    package = tmp_path / "pcl_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(PACKAGE / "ops", package / "ops")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom pcl_ext import ops; print(ops.native_status())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"not built: {tmp_path} holds the sources, not the installed package" in result.stdout
    assert f"UserWarning: pcl_ext is imported from its sources in {tmp_path}, which hold no kernels" in result.stderr


def test_without_fast_products_torch_multiplies(monkeypatch):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    monkeypatch.setattr(ops.linear_op, "PAYS", False)
    monkeypatch.setattr(ops.linear_op, "forward", None)
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
    ones, zeros = torch.ones(4), torch.zeros(4)
    ops.feed_forward(x, (ones, zeros), weight, torch.zeros(5), weight.T, zeros)
