"""DualPrompt (Wang et al., 2022): general prompts of all tasks in the lower layers, a task's expert prompts above.

Prompts are keys and values of a layer (prefix tuning). The task is known here, so no key has to be learned to guess it.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.continual.learner import Learner
from pcl_ext.batch import PackedBatch
from pcl_ext.model import LayerPrefix

LENGTH = 5


class DualPrompt(Learner):
    def __init__(self, model, world):
        super().__init__(model, world)
        config = model.backbone.config
        self.shape = (2, LENGTH, config.num_heads, config.dim // config.num_heads)
        self.lower = max(1, config.num_layers // 2)
        self.upper = config.num_layers - self.lower
        self.general = nn.Parameter(torch.randn(self.lower, *self.shape) * 0.1)
        self.expert: dict[str, nn.Parameter] = {}

    def begin(self, name: str) -> None:
        self.expert[name] = nn.Parameter(torch.randn(self.upper, *self.shape) * 0.1)

    def trained(self) -> list[nn.Parameter]:
        return [self.general, self.expert[self.model.task_names[-1]]]

    def end(self, name: str) -> None:
        self.expert[name].requires_grad_(False)

    def prefix(self, history: PackedBatch, name: str) -> LayerPrefix | None:
        if name == "next":
            return None
        keys, values = torch.cat([self.general, self.expert[name]]).unbind(1)
        return LayerPrefix(list(keys), list(values), torch.tensor([0, LENGTH]))

    def extra_parameters(self, name: str) -> float:
        return self.expert[name].numel()
