"""A comparison small enough for tests: 200 synthetic users, two tasks after T1, a backbone of width 16."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: the installed pcl_ext goes before this tree's

from benchmarks.continual import schedule, studies
from benchmarks.continual.schedule import Plan
from benchmarks.continual.settings import Budget
from benchmarks.continual.trial import Trial, make_learner, pretrained
from pcl_ext.data import synthetic

TASKS = ("segment", "range")
BUDGET = Budget(pretrain_epochs=2, epochs=2, retrain_epochs=1, dim=16, max_len=20)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """A folder with a dataset in data/tiny and the backbone of seed 0."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("continual")
    synthetic.prepare(out / "data" / "tiny", num_users=200, num_items=50, mean_length=12)
    pretrained(trial(out, "pcl"), out)
    return out


def trial(out, method, point=0, tasks=TASKS):
    return Trial(method, str(out / "data" / "tiny"), "tiny", 0, point, BUDGET, tasks)


@pytest.fixture
def learner(comparison):
    """A function: method name -> its learner, before T1 is taken over."""

    def make(method, **setting):
        torch.set_num_threads(1)
        made = make_learner(trial(comparison, method), comparison)
        if setting:
            made.world = replace(made.world, setting=replace(made.world.setting, **setting))
        return made

    return make


@pytest.fixture
def outputs():
    """A function: learner, task -> its outputs on the valid users."""

    def read(learner, task):
        found = []
        learner.measure(task, "valid", lambda batch, output, columns: found.append(output.clone()))
        return torch.cat(found)

    return read


@pytest.fixture
def tiny_budget():
    return BUDGET


@pytest.fixture
def inline(monkeypatch):
    """Trials run in this process; `inline.done` lists them."""

    class Future:
        def __init__(self, function, *arguments):
            self.error = None
            try:
                function(*arguments)
            except Exception as error:
                self.error = error

        def result(self):
            if self.error is not None:
                raise self.error

        def exception(self):
            return self.error

    class Pool:
        done = []

        def __init__(self, *_, **__):
            self.done.clear()

        def submit(self, function, *arguments):
            self.done.append(arguments)
            return Future(function, *arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def shutdown(self, **_):
            return None

    class Done:
        def __init__(self, done):
            self.done = done

    monkeypatch.setattr(schedule, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(schedule, "wait", lambda waiting, return_when: Done(list(waiting)))
    monkeypatch.setattr(studies, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(studies, "as_completed", list)
    return Pool


@pytest.fixture
def plan(comparison, tiny_budget):
    torch.set_num_threads(1)
    data = {"tiny": str(comparison / "data" / "tiny")}
    methods = ("popularity", "probe", "fine", "mtl", "pcl")
    return Plan(methods, data, 2, tiny_budget, points=2, tasks=("segment", "range"))


@pytest.fixture
def out(comparison, tmp_path):
    """A folder of results that has the tiny dataset's backbone already."""
    shutil.copytree(comparison / "backbones", tmp_path / "backbones")
    return tmp_path
