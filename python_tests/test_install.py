"""The package installs with and without its compiled module, and works either way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stores import make_model

from pcl_ext import save_pretrained

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


def test_the_core_needs_no_extra(tmp_path):
    """Of a run: load, predict for lists. What needs more says so when it is asked for."""
    save_pretrained(make_model("next", "ctr"), tmp_path / "run")
    script = f"""
import sys
for name in ("pyarrow", "jsonargparse", "tqdm", "torchmetrics", "matplotlib", "tensorboard"):
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
    assert run.stdout.splitlines() == ["(2,)", "datasets on disk need pyarrow: pip install 'pcl_ext[cli]'"]
