"""Every recipe of docs/trainers, run as it stands: on one process the bits of the plain loop, on two its losses."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pcl_ext.data import Dataset, prepare_synthetic

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")]
ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "docs/trainers"
# the recipe, and what it needs of the extra `trainers`
ALONE = {"lightning_trainer": "lightning", "hugging_face": "transformers", "accelerate_loop": "accelerate"}
UNDER_TORCHRUN = ["data_parallel", "fully_sharded", "sharded_table"]


def start(folder, recipe, processes=None, kill_at=None):
    """Run a recipe in `folder`, under torchrun where `processes` are given: the losses of every process.

    kill_at  rank 1 is killed in this step; nothing is returned
    """
    command = [sys.executable]
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [Path(__file__).parent / "run_recipe.py", RECIPES / f"{recipe}.py"]
    command += [] if kill_at is None else [str(kill_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == (kill_at is None), done.stderr[-4000:]
    if kill_at is not None:
        return None
    return [json.loads((folder / f"losses-{rank}.json").read_text()) for rank in range(processes or 1)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A small dataset, and the losses and weights of the plain loop over it."""
    folder = tmp_path_factory.mktemp("plain")
    prepare_synthetic(folder / "shop", num_users=150, num_items=60, mean_length=12)
    Dataset(folder / "shop")
    (losses,) = start(folder, "plain_loop")
    return folder / "shop", losses, torch.load(folder / "model.pt")


@pytest.fixture
def folder(shop, tmp_path):
    (tmp_path / "shop").symlink_to(shop[0])
    return tmp_path


def test_the_plain_loop_learns(shop):
    losses = shop[1]
    assert len(losses) > 4
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("recipe", ALONE)
def test_a_trainer_gives_the_bits_of_the_plain_loop(shop, folder, recipe):
    if find_spec(ALONE[recipe]) is None:
        pytest.skip(f"needs {ALONE[recipe]}, of the extra 'trainers'")
    assert start(folder, recipe) == [shop[1]]
    assert_same_bits(torch.load(folder / "model.pt"), shop[2])


@pytest.mark.parametrize("recipe", UNDER_TORCHRUN)
def test_one_process_under_torchrun_gives_the_bits_of_the_plain_loop(shop, folder, recipe):
    assert start(folder, recipe, 1) == [shop[1]]
    assert_same_bits(weights(folder, shop[2]), shop[2])


@pytest.mark.parametrize("recipe", UNDER_TORCHRUN)
def test_two_processes_learn_what_one_does(shop, folder, recipe):
    """The same steps, so the same losses and weights, but for the order in which sums are taken."""
    losses = torch.tensor(start(folder, recipe, 2), dtype=torch.float64)
    torch.testing.assert_close(losses.mean(0), torch.tensor(shop[1]).double(), rtol=1e-5, atol=0)
    found = weights(folder, shop[2])
    assert found.keys() == shop[2].keys()
    for name, value in shop[2].items():
        found[name], value = without_key_bias(name, found[name]), without_key_bias(name, value)
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def without_key_bias(name, value):
    """It adds the same to all scores of a row: its gradient is 0 but for rounding, which AdamW makes steps of."""
    if not name.endswith("qkv.bias"):
        return value
    query, _, answer = value.chunk(3)
    return torch.cat([query, answer])


def test_a_run_of_two_processes_goes_on_after_one_is_killed(shop, folder):
    """Killed between forward and backward of the fourth step: the same weights as without."""
    start(folder, "data_parallel", 2, kill_at=4)
    losses = start(folder, "data_parallel", 2)
    assert all(0 < len(part) < len(shop[1]) for part in losses)  # the steps before were not done again
    resumed = weights(folder, shop[2])
    (folder / "checkpoint.pt").unlink()
    start(folder, "data_parallel", 2)
    assert_same_bits(resumed, weights(folder, shop[2]))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_a_recipe_is_short(path):
    tree = ast.parse(path.read_text())
    alone = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    notes = [value for value in alone if isinstance(value, ast.Constant)]
    code = {line for node in ast.walk(tree) if hasattr(node, "lineno") for line in (node.lineno, node.end_lineno)}
    code -= {line for note in notes for line in range(note.lineno, note.end_lineno + 1)}
    assert len(code) < 40


def weights(folder, like):
    """What a recipe under torchrun left: its checkpoint, or the parts of every process."""
    if (folder / "checkpoint.pt").exists():
        return torch.load(folder / "checkpoint.pt")["model"]
    state = {"model": {name: torch.zeros_like(value) for name, value in like.items()}}
    dcp.load(state, checkpoint_id=folder / "model")
    return state["model"]


def assert_same_bits(found, want):
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")
