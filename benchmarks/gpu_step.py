"""A step of prompt tuning on the GPU, 2 layers, under bfloat16 autocast, against the same in PyTorch, padded.

Both are compiled. The share of the roofline counts matrix products alone: all layers on the real rows, and gradients of
rows.
"""

from copy import deepcopy

import torch
from bench_train_step import Step, our_step, their_step
from gpu_measure import Bench, Work
from padded_model import CLASSES, ITEMS, TASKS, assert_as_right_as, forward_gflop, in_groups, make_batch, make_model

USERS, SHAPES = 2048, [(256, 4), (64, 2)]  # D, H


def compiled(bench: Bench, step: Step) -> Step:
    """The same, forward and backward by torch.compile, for this shape alone."""
    step.compute = torch.compile(step.compute, backend=bench.backend, dynamic=False)
    return step


def bench_shape(bench: Bench, dim: int, num_heads: int) -> None:
    """One row a task."""
    users = 9 if bench.dry else USERS
    model = make_model(dim, num_heads).train().to(bench.device)
    batch = make_batch(users)
    groups = [group.to(bench.device) for group in in_groups(batch, 1)]
    linear, attention = forward_gflop(batch, dim)
    work = Work(0, 1e9 * (2 * linear + 3.5 * attention))
    batch = batch.to(bench.device)
    targets = {"items": torch.randint(ITEMS // 2, ITEMS, (users,)), "label": torch.randint(CLASSES, (users,))}

    def build(name: str):
        torch.compiler.reset()  # or what was compiled for other cases would be made general
        task = (batch, name, targets[name].to(bench.device))
        exact = their_step(model, groups, *task, False, torch.double).gradients()
        theirs = their_step(model, groups, *task, True)
        ours = our_step(deepcopy(model), *task, True)
        assert_as_right_as(ours.gradients(), theirs.gradients(), exact)
        peers = {"padded, not compiled": lambda: theirs}
        peers["padded"] = lambda: compiled(bench, their_step(model, groups, *task, True))
        return compiled(bench, our_step(deepcopy(model), *task, True)), peers, work

    for name in TASKS:
        bench.case(f"prompt-tuning step, D {dim}, {name}", lambda name=name: build(name))


def run(bench: Bench) -> None:
    """All shapes."""
    for dim, num_heads in [(32, 2)] if bench.dry else SHAPES:
        bench_shape(bench, dim, num_heads)
