"""Training and use on a device that is not the CPU: what `other_device.py` checks, in a process of its own.

Where no GPU is, a device written in Python stands in for one: to PyTorch it is no CPU, and mixing the two raises.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytest.importorskip("pyarrow")
CHECKS = [
    "pretrain",
    "pretrain over a sample",
    "binary",
    "regression",
    "cold items",
    "items over a sample",
    "repeats",
    "repeats over a sample",
    "prefix and members",
    "contextual",
    "low rank",
    "mixed tasks",
    "predict",
    "predictor",
    "export",
    "user state",
    "pretrain resumed",
    "learn resumed",
    "command",
]


@pytest.fixture(scope="module", params=["stand_in", pytest.param("cuda", marks=pytest.mark.gpu)])
def found(tmp_path_factory, request):
    """{check: "" or what went wrong}"""
    if request.param == "stand_in" and not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot have a device written in Python")
    script = Path(__file__).with_name("other_device.py")
    call = [sys.executable, str(script), str(tmp_path_factory.mktemp("other")), request.param]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_the_same_comes_out_and_devices_are_not_mixed(found, check):
    if check == "command":
        pytest.importorskip("jsonargparse")
    assert not found[check], found[check]


def test_bfloat16(found):
    if "bfloat16" not in found:
        pytest.skip("the stand-in has no autocast")
    assert not found["bfloat16"], found["bfloat16"]


def test_no_check_is_left_out(found):
    assert set(found) - {"bfloat16"} == set(CHECKS)
