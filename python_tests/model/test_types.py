"""What a type checker tells a user of the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pcl_ext

CALLS = """
from typing import Any, assert_type

import torch
from torch import Tensor

from pcl_ext import Backbone, BackboneConfig, PackedBatch, TaskSpec, UserModel, task_loss
from pcl_ext.infer import Score

model = UserModel(Backbone(BackboneConfig(50)))
task = model.add_task(TaskSpec("click", "binary"))
lists: list[list[int]] = [[1, 2], []]
batch = PackedBatch.from_lists(lists, num_items=50, max_len=20)
rows = torch.arange(2)
assert_type(model(batch, "click"), Tensor)
assert_type(model(batch, task_index=rows), dict[str, tuple[Tensor, Tensor]])
assert_type(model.backbone(batch), list[Tensor])
assert_type(model.predict(lists, "click"), list[dict[str, Any]])
assert_type(task_loss(task.spec, model(batch, "click"), rows, rows), Tensor)


def reported(scores: dict[str, Score]) -> float:
    return scores[task.spec.name].metrics[task.spec.metric]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.assert_type")
def test_calls_have_types(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    root = Path(pcl_ext.__file__).parents[1]
    path = {} if root.name == "site-packages" else {"MYPYPATH": str(root)}
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "calls.py"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
