"""TERACON (Kim et al., 2023): soft gates that know the relations between tasks. The backbone keeps training;
pseudo-labels of the previous model retain the earlier tasks."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.continual.learner import Learner, View
from benchmarks.continual.methods.gates import Gates, gated, opening, widths
from pcl_ext.data import ExampleBatch
from pcl_ext.model import UserModel

S_MAX = 50.0
EMBEDDING = 32
STEEPNESS = 6.0  # of how the need to retain a task falls with its similarity


class Relations(nn.Module):
    """Gates of every task: sigmoid(s MLP_t(tanh(s [e_t; e_i; -e_i for i != t]))); tasks not met yet are 0."""

    def __init__(self, names: list[str], units: dict[str, int]):
        super().__init__()
        self.names, self.units, self.met = names, units, []
        self.embedding = nn.ParameterList(2 * torch.rand(EMBEDDING) for _ in names)
        inputs, total = (2 * len(names) - 1) * EMBEDDING, sum(units.values())
        self.mlp = nn.ModuleList(nn.Linear(inputs, total) for _ in names)
        for mlp in self.mlp:
            # Open at S_MAX, whichever tasks are met: the backbone is pretrained. The authors' spread of the logits.
            nn.init.normal_(mlp.weight, 0.0, 0.01 * EMBEDDING**-0.5)
            nn.init.constant_(mlp.bias, 0.1)

    def forward(self, name: str, s: float) -> Gates:
        place, parts = self.names.index(name), [self.embedding[self.names.index(name)]]
        for i, other in enumerate(self.names):
            if i != place:
                e = self.embedding[i] if other in self.met else torch.zeros_like(parts[0])
                parts += [e, -e]
        logits = self.mlp[place](torch.tanh(s * torch.cat(parts)))
        gates = torch.sigmoid(s * logits).split(list(self.units.values()))
        return dict(zip(self.units, gates))


class Teracon(Learner):
    """Retention is one earlier task a step, drawn by `need`: its expectation is the mean over all of them with these
    weights."""

    adapts = True
    previous: tuple[UserModel, Relations] | None = None

    def __init__(self, model, world):
        super().__init__(model, world)
        self.relations = Relations(["next", *world.tasks], widths(model.backbone.config))
        self.relations.met.append("next")

    def first(self) -> None:
        self.fit_next(self.world.budget.retrain_epochs)

    def begin(self, name: str) -> None:
        previous = copy.deepcopy((self.model.backbone, self.relations))
        object.__setattr__(self, "previous", previous)  # no part of this module: nobody trains or stores it
        for part in previous:
            part.eval()
        self.relations.met.append(name)

    def trained(self) -> list[nn.Parameter]:
        return [*self.model.backbone.parameters(), *self.relations.parameters()]

    @property
    def s(self) -> float:
        return opening(self.progress, S_MAX) if self.training else S_MAX

    def gates(self, name: str) -> Gates:
        return self.relations(name, self.s)

    def view(self, name: str) -> View:
        return View(self.model.backbone, gated(self.model.backbone, self.gates(name)))

    def loss(self, batch: ExampleBatch, name: str) -> Tensor:
        return self.task_loss(batch, name) + self.world.setting.strength * self.retention(batch, name)

    @torch.no_grad()
    def need(self, name: str, other: str) -> Tensor:
        """How much of an earlier task has to be retained while `name` is learned, 0..1: 1 - sigmoid(6 cosine of their
        gates), a mean over the gated places. Learning a similar task retains it by itself."""
        own, others = self.gates(name), self.gates(other)
        cosines = torch.stack([F.cosine_similarity(own[unit], others[unit], dim=0) for unit in own])
        return torch.sigmoid(-STEEPNESS * cosines).mean()

    def retention(self, batch: ExampleBatch, name: str) -> Tensor:
        """Squared distance of an earlier task's outputs to the previous model's, both as open as `s` says."""
        earlier = [other for other in self.model.task_names if other != name]
        other = earlier[int(torch.stack([self.need(name, other) for other in earlier]).multinomial(1))]
        task, (backbone, relations) = self.model.task(other), self.previous
        with torch.no_grad():
            view = View(backbone, gated(backbone, relations(other, self.s)))
            then = task(self.encode(batch.history, other, view), view.table)
        unit = task.head.unit[1] if task.spec.kind == "regression" else 1.0
        return F.mse_loss(self.output(batch.history, other) / unit, then / unit)

    def extra_parameters(self, name: str) -> float:
        mlp = self.relations.mlp[self.relations.names.index(name)]
        return EMBEDDING + sum(p.numel() for p in mlp.parameters())
