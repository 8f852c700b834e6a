"""A backbone per task: a fine-tuned copy of the pretrained one (the ceiling), or one from scratch (SinMo)."""

from __future__ import annotations

from torch import nn

from benchmarks.continual.learner import Learner, numbers_in, trainable_copy
from pcl_ext.model import Backbone, Task, UserModel, freeze
from pcl_ext.model.backbone import NamedModules


class Copy(Learner):
    def __init__(self, model, world):
        super().__init__(model, world)
        self.copies = NamedModules()

    def start(self) -> Backbone:
        """Where a task's own backbone starts."""
        return trainable_copy(self.model.backbone)

    def start_task(self, name: str) -> Task:
        """Its rows start as those of its own backbone do."""
        self.copies[name] = self.start()
        spec = self.world.dataset.task(name).spec
        self.model.tasks[name] = UserModel(self.copies[name]).add_task(spec, self.memory(name))
        return self.model.task(name)

    def trained(self) -> list[nn.Parameter]:
        return list(self.copies[self.model.task_names[-1]].parameters())

    def view(self, name: str) -> Backbone:
        return self.copies[name] if name in self.copies else self.model.backbone

    def end(self, name: str) -> None:
        freeze(self.copies[name])

    def train(self, mode: bool = True):
        super().train(mode)
        for copy in self.copies.values():
            copy.train(mode and any(True for _ in copy.parameters()))
        return self

    def extra_parameters(self, name: str) -> float:
        return numbers_in(self.copies[name])


class Single(Copy):
    """Nothing is shared. T1 from scratch is pretraining itself."""

    scratch = True

    def start(self) -> Backbone:
        backbone = Backbone(self.model.backbone.config)
        backbone.trained_items.copy_(self.model.backbone.trained_items)
        return backbone
