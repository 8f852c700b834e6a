"""A step of prompt tuning on the GPU, 2 layers, under bfloat16 autocast, against the same in PyTorch, padded.

Both are compiled. Gradients are compared with those in float64 for a few of the users, whose padded rows fit in memory.
The share of the roofline counts matrix products alone: all layers on the real rows, and gradients of rows.
"""

from copy import deepcopy

import torch
from bench_train_step import Step, our_step, their_step
from gpu_measure import Bench, Work
from padded_model import CLASSES, ITEMS, TASKS, assert_as_right_as, forward_gflop, in_groups, make_batch, make_model

from pcl_ext import UserModel

USERS, CHECKED, MEAN, MOST, PROMPTS = 4096, 256, 100, 512, 16
SHAPES = [(256, 4), (64, 2)]  # D, H


def compiled(bench: Bench, step: Step) -> Step:
    """The same, forward and backward by torch.compile, for this shape alone."""
    step.compute = torch.compile(step.compute, backend=bench.backend, dynamic=False)
    return step


class Users:
    """A batch on the device, packed and padded, and what they are to learn."""

    def __init__(self, bench: Bench, users: int):
        users = min(users, 9) if bench.dry else users
        self.host = make_batch(users, MEAN, MOST)
        self.batch = self.host.to(bench.device)
        self.groups = [group.to(bench.device) for group in in_groups(self.host, 1, PROMPTS)]
        self.targets = {
            "items": torch.randint(ITEMS // 2, ITEMS, (users,)).to(bench.device),
            "label": torch.randint(CLASSES, (users,)).to(bench.device),
        }

    def ours(self, model: UserModel, name: str) -> Step:
        """Packed."""
        return our_step(deepcopy(model), self.batch, name, self.targets[name], True)

    def theirs(self, model: UserModel, name: str, short: bool = True, dtype: torch.dtype = torch.float32) -> Step:
        """Padded."""
        return their_step(model, self.groups, self.batch, name, self.targets[name], short, dtype)


def bench_shape(bench: Bench, dim: int, num_heads: int) -> None:
    """One row a task."""
    model = make_model(dim, num_heads, max_len=MOST, prompts=PROMPTS).train().to(bench.device)
    users, few = Users(bench, USERS), Users(bench, CHECKED)
    linear, attention = forward_gflop(users.host, dim)
    work = Work(0, 1e9 * (2 * linear + 3.5 * attention))

    def build(name: str):
        torch.compiler.reset()  # or what was compiled for other cases would be made general
        exact = few.theirs(model, name, False, torch.double).gradients()
        assert_as_right_as(few.ours(model, name).gradients(), few.theirs(model, name).gradients(), exact)
        peers = {"padded": lambda: compiled(bench, users.theirs(model, name))}
        peers["padded, not compiled"] = lambda: users.theirs(model, name)
        peers["ours, not compiled"] = lambda: users.ours(model, name)
        return compiled(bench, users.ours(model, name)), peers, work

    for name in TASKS:
        bench.case(f"prompt-tuning step, D {dim}, {name}", lambda name=name: build(name))


def run(bench: Bench) -> None:
    """All shapes."""
    for dim, num_heads in SHAPES[:1] if bench.dry else SHAPES:
        bench_shape(bench, dim, num_heads)
