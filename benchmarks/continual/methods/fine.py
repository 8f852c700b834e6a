"""FineAll: one backbone, trained on every task in turn. What it forgets is what a continual learner is measured by."""

from __future__ import annotations

from benchmarks.continual.learner import Learner


class Fine(Learner):
    adapts = True
