"""Where a training run stands, kept on disk: a run that is killed goes on from there with the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcl_ext import store

_PAUSE = 20  # times what a save took, until the next: at most a twentieth of a run is spent on them


@dataclass
class Progress:
    """Where a run stands: the step to do next, one entry an epoch of the learning curve, and the metrics before
    the first epoch where the start may be kept."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    curve: list[dict] = field(default_factory=list)
    start: dict[str, float] | None = None

    def stale_epochs(self) -> int:
        """Epochs since the best one."""
        best = max((entry["epoch"] for entry in self.curve if entry["best"]), default=-1)
        return len(self.curve) - 1 - best


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value then, value now) of everything in which two nests of JSON values differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield name, then, now


class Checkpoint:
    """Everything a run needs to go on, on the CPU with the same bits: weights, optimiser, generator, place in the data.

    One safetensors file, written atomically; no path, no checkpoints.
    """

    def __init__(
        self,
        path: str | Path | None,
        seconds: float,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
    ):
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise FileNotFoundError(f"the folder of the checkpoint {path} is missing")
        self.seconds, self.identity = seconds, json.loads(json.dumps(identity))
        self.trained, self.optimizer, self.written, self.took = trained, optimizer, time.monotonic(), 0.0
        self.cuda = next((p.device for p in trained.values() if p.is_cuda), None)  # dropout draws there

    def save(self, progress: Progress, best: dict[str, Tensor], average: dict[str, Tensor], now: bool = False) -> None:
        """Write where `seconds` have passed since the last time, or `now`; but not before 20 times what that save took:
        a large model is written seldom."""
        started = time.monotonic()
        if self.path is None or started - self.written < max(0.0 if now else self.seconds, _PAUSE * self.took):
            return
        state = self.optimizer.state_dict()
        tensors = {f"weight/{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"best/{name}": value for name, value in best.items()}
        tensors |= {f"average/{name}": value for name, value in average.items()}
        tensors |= {f"optimizer/{i}/{key}": t for i, part in state["state"].items() for key, t in part.items()}
        tensors["generator"] = torch.get_rng_state()
        if self.cuda is not None:
            tensors["cuda_generator"] = torch.cuda.get_rng_state(self.cuda)
        store.save_tensors(self.path, tensors, {"identity": self.identity, "progress": asdict(progress)})
        self.written = time.monotonic()
        self.took = self.written - started

    def load(self) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
        """Where to go on, the best weights and the average: the start, where there is no file. Raises ValueError for a
        file of another run, or a damaged one."""
        if self.path is None or not self.path.exists():
            return Progress(), {}, {}
        tensors, meta = store.load_tensors(self.path, f"remove {self.path} to start this training again")
        for key, then, now in differences(meta["identity"], self.identity):
            raise ValueError(
                f"{self.path} is the checkpoint of a run with {key} = {then!r}, this one has {now!r}; "
                "repeat that run's settings to resume it, or remove the file to start again"
            )
        groups = {"weight": {}, "best": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind in ("best", "average"):
                tensor = tensor.to(self.trained[rest].device)
            if kind in groups:
                groups[kind][rest] = tensor
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(groups["weight"][name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            place, _, key = name.partition("/")
            state.setdefault(int(place), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["generator"])
        if self.cuda is not None and "cuda_generator" in tensors:
            torch.cuda.set_rng_state(tensors["cuda_generator"], self.cuda)
        return Progress(**meta["progress"]), groups["best"], groups["average"]
