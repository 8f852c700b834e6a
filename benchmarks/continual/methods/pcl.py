"""PCL through `pcl_ext.train.learn_task`: the default memory, Eq. (1) alone, and the memory without backbone."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.continual.learner import Learner, trainable_copy
from benchmarks.continual.settings import EQ1
from pcl_ext.model import MemoryConfig, UserModel
from pcl_ext.train import learn_task


class Pcl(Learner):
    def memory(self, name: str) -> MemoryConfig:
        return self.world.setting.memory or MemoryConfig()

    def learn(self, name: str) -> None:
        started = time.process_time()
        learn_task(self.model, self.world.dataset, name, self.world.learn_config(), self.memory(name))
        self.seconds[name] = time.process_time() - started

    def output(self, history, name: str):
        return self.model(history, name)

    def trained(self) -> list[nn.Parameter]:
        return []


class PclEq1(Pcl):
    """Eq. (1) as published: a tail prompt, the newest state, a linear head."""

    def memory(self, name: str) -> MemoryConfig:
        return self.world.setting.memory or EQ1


class PclNoBackbone(Pcl):
    """The same memory on a backbone of zeros: what the memory does alone."""

    def __init__(self, model, world):
        super().__init__(model, world)
        silent = UserModel(trainable_copy(model.backbone))
        with torch.no_grad():
            for parameter in silent.backbone.parameters():
                parameter.zero_()
            silent.backbone.trained_items.zero_()
        silent.freeze_backbone()
        silent.tasks["next"] = model.tasks["next"]
        self.model = silent
