"""A task nobody has learned: its prompt is made from the closed tasks', and only its head learns, from few labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.continual.labels import FewLabels
from benchmarks.continual.learner import Learner
from benchmarks.continual.settings import EQ1
from pcl_ext.model import UserModel, hashed_text_vector
from pcl_ext.task import TaskSpec

WAYS = ("none", "mean", "attention")
SHARPNESS = 10.0  # of the attention over texts, whose cosines are small


@contextmanager
def held_out(model: UserModel, name: str) -> Iterator[None]:
    """The model as if it had not learned one of its tasks: those of Eq. (1) know nothing of each other."""
    task = model.tasks.pop(name)
    try:
        yield
    finally:
        model.tasks[name] = task


def made_prompt(model: UserModel, spec: TaskSpec, way: str) -> Tensor:
    """[P, D] from the tail prompts of the closed tasks: none (zeros), their mean, or attention by the tasks' texts."""
    sources = [task for task in model.tasks.values() if "tail" in task.memories]
    rows = torch.stack([task.memories["tail"].rows for task in sources])
    if way == "none":
        return torch.zeros_like(rows[0])
    if way == "mean":
        return rows.mean(0)
    text = hashed_text_vector(spec.description or spec.name)
    weights = (SHARPNESS * torch.stack([task.text for task in sources]) @ text).softmax(0)
    return torch.einsum("k,kpd->pd", weights, rows)


def learn_unseen(learner: Learner, name: str, way: str, labels: int) -> float:
    """The test metric of a held-out task: prompt made one of the WAYS and kept, head learned from `labels` users."""
    world = learner.world
    few = Few(learner.model, replace(world, dataset=FewLabels(str(world.dataset.path), world.seed, count=labels)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        spec = world.dataset.task(name).spec
        prompt = made_prompt(few.model, spec, way)  # from all tasks that are there, and this one is not yet
        task = few.model.add_task(spec, EQ1)
        with torch.no_grad():
            task.memories["tail"].rows.copy_(prompt)
        task.memories["tail"].rows.requires_grad_(False)
        few.fit_head(name)
        few.fit(name)
    metrics, _ = few.measure(name, "test")
    few.model.remove_task(name)
    return metrics[spec.metric]


class Few(Learner):
    """A frozen model; the task's prompt is in the forward pass, but does not learn."""

    def output(self, history, name: str) -> Tensor:
        return self.model(history, name)

    def encode(self, history, name: str, view=None):
        return self.model.read(history, name)

    def trained(self) -> list:
        return []
