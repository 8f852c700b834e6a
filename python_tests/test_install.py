"""The package installs with and without its compiled module, and works either way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stores import make_model

from pcl_ext import save_pretrained
from pcl_ext.ops import _gpu

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch
import pcl_ext
from pcl_ext import ops
offsets = torch.tensor([0, 3, 5])
q = torch.randn(5, 2, 4, requires_grad=True)
ops.prompt_attention(q, q, q, offsets).sum().backward()
print(pcl_ext.__file__, ops.has_fused())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "fused"), [("cmake.define.PCL_CUDA=OFF", True), ("wheel.cmake=false", False)])
def test_installs(setting, fused, tmp_path):
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("nanobind")
    settings = [f"--config-settings={setting}", f"--config-settings=build-dir={tmp_path / 'build'}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, *settings, "--target", tmp_path / "site", ROOT], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    shown = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == [str(tmp_path / "site/pcl_ext/__init__.py"), str(fused)]


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CMAKE = shutil.which("cmake") or shutil.which(Path(sys.executable).with_name("cmake"))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.skipif(CMAKE is None, reason="no CMake")
def test_a_cuda_compiler_is_found_where_there_was_none_before(tmp_path):
    pytest.importorskip("nanobind")
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_COMPILER=NOTFOUND"]  # as the first time left it
    command = [CMAKE, "-S", ROOT, "-B", tmp_path, *options]
    environment = {**os.environ, "CUDACXX": NVCC}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "no working CUDA compiler was found" not in shown.stdout


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.skipif(CMAKE is None, reason="no CMake")
def test_cuda_kernels_compile_and_load_without_a_driver(tmp_path):
    pytest.importorskip("nanobind")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={NVCC}", "-DPCL_WERROR=ON"]
    subprocess.run([CMAKE, "-S", ROOT, "-B", tmp_path, *options, "-DCMAKE_CUDA_ARCHITECTURES=90-real"], check=True)
    subprocess.run([CMAKE, "--build", tmp_path, "--target", "_cuda", "--parallel", "2"], check=True)
    script = "import _cuda; print(_cuda.compiler(), _cuda.refusal() >= 0)"
    shown = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"nvcc \d+\.\d+ True\n", shown.stdout)


@pytest.fixture
def sources(tmp_path):
    """A folder that make takes for the project's, with an environment whose pip does nothing; and how to call make."""
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "constraints.txt", "venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("cmake", "csrc", "pcl_ext"):
        (tmp_path / name).mkdir()
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")

    def make(*words, **environment):
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "CUDACXX"))}
        command = ["make", "-C", tmp_path, "VENV=venv", "PIP=true", *words]
        return subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=False)

    return make


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@needs_make
def test_make_remembers_cuda_kernels_only_where_they_were_built(sources, tmp_path):
    stamp, modules = tmp_path / "venv/.installed-cuda-1", tmp_path / "venv/lib/python3.11/site-packages/pcl_ext"
    assert sources("dev", "CUDA=0").returncode == 0
    result = sources("dev", "CUDA=1")
    assert result.returncode != 0
    assert "built no CUDA kernels: they need nvcc 11.8 or newer, on PATH" in result.stderr
    assert not stamp.exists()
    modules.mkdir(parents=True)
    (modules / "_cuda_emulated.cpython-311.so").touch()
    assert sources("dev", "CUDA=1").returncode != 0
    (modules / "_cuda.cpython-311.so").touch()
    assert sources("dev", "CUDA=1").returncode == 0
    assert stamp.exists()


@needs_make
def test_make_names_the_cuda_compiler(sources, tmp_path):
    show = "--eval=show: ; @echo compiler=$$CUDACXX"
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    path = {"PATH": f"{nvcc.parent}:/usr/bin:/bin"}
    assert f"compiler={nvcc}\n" in sources("show", show, "CUDA=1", **path).stdout
    assert "compiler=mine\n" in sources("show", show, "CUDA=1", CUDACXX="mine", **path).stdout
    assert "compiler=\n" in sources("show", show, "CUDA=0", **path).stdout


@needs_make
def test_make_asks_for_a_gpu_before_it_builds(sources):
    shown = sources("--dry-run", "gpu-check").stdout
    assert 0 < shown.index("python benchmarks/gpu_check.py --ready") < shown.index("dev CUDA=1")
    assert shown.index("dev CUDA=1") < shown.rindex("gpu_check.py --out")


@needs_make
@pytest.mark.parametrize("code", [0, 1])
def test_make_takes_a_python_that_is_ready_as_it_is(code, sources, tmp_path):
    python = tmp_path / "bin/ready"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\ncase "$@" in *--ready) ;; *) exit {code} ;; esac\n')
    python.chmod(0o755)
    result = sources("gpu-check", f"PYTHON={python}", OUT="some folder")
    assert (result.returncode == 0) == (code == 0)
    script = "benchmarks/gpu_check.py --build"
    assert (tmp_path / "called").read_text().splitlines() == [f"{script} --ready", f"{script} --out some folder"]
    assert not (tmp_path / "venv/.torch").exists()


def test_the_core_needs_no_extra(tmp_path):
    """Of a run: load, predict for lists. What needs more says so when it is asked for."""
    save_pretrained(make_model("next", "ctr"), tmp_path / "run")
    script = f"""
import sys
for name in ("pyarrow", "jsonargparse", "tqdm", "torchmetrics", "matplotlib"):
    sys.modules[name] = None
import pcl_ext, pcl_ext.export
print(pcl_ext.Predictor({str(tmp_path / "run")!r}).predict([[1, 2], []], "ctr")["probability"].shape)
try:
    from pcl_ext.serve import ItemIds
    ItemIds("items.parquet")
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "(2,)",
        "datasets on disk need pyarrow: pip install '.[cli]' in the sources of pcl_ext",
    ]


@pytest.mark.skipif(_gpu._RUNS, reason="CUDA kernels have constants to mark for compiled graphs")
def test_a_start_does_not_wait_for_torchs_compiler(tmp_path):
    script = "import sys, pcl_ext, pcl_ext.train, pcl_ext.infer; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
