"""Linear probes: the frozen backbone, a readout and a head. Which readout is the setting's: last state, or pooled."""

from __future__ import annotations

from torch import nn

from benchmarks.continual.learner import Learner


class Probe(Learner):
    def trained(self) -> list[nn.Parameter]:
        return []
