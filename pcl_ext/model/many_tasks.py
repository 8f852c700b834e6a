"""Histories read for many tasks at once: rows of a batch that belong to different tasks, and all tasks of each user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from pcl_ext.batch import PackedBatch
from pcl_ext.model.backbone import Backbone, is_frozen
from pcl_ext.model.encoded import Encoded, Trunk, encode
from pcl_ext.model.layout import LayerPrefix, to_offsets
from pcl_ext.model.task_module import Task
from pcl_ext.model.user_state import UserState

TAIL_ROWS = 16_384  # tails computed together: more would take memory and no less time


def encode_rows(backbone: Backbone, batch: PackedBatch, tasks: list[Task], index: Tensor | None = None) -> Encoded:
    """Histories with each row's own prompts. index [B] int64 into tasks; None: all rows are of tasks[0].

    While a tail prompt learns on a frozen backbone, what lies before it needs no gradient: it is a trunk.
    """
    prompt, prompt_index = _stack_tails(tasks, index)
    prefix = _prefix_of_rows(backbone, tasks, index)
    every_state = any(task.every_state for task in tasks)
    learns = prompt is not None and prompt.requires_grad and torch.is_grad_enabled()
    if learns and prefix is None and is_frozen(backbone):
        trunk = Trunk.of(backbone, batch, prompt.shape[1], every_state=every_state)
        return trunk.read(prompt, prompt_index, every_state)[0]
    return encode(backbone, batch, prompt, prompt_index, prefix, every_state=every_state)


def _prefix_of_rows(backbone: Backbone, tasks: list[Task], index: Tensor | None) -> LayerPrefix | None:
    kept = [task.layer_prefix(backbone) for task in tasks]
    if index is None:
        return kept[0]
    present = [prefix for prefix in kept if prefix is not None]
    if not present:
        return None
    index = _among_present(kept, index)
    if len(present) == 1:
        return replace(present[0], index=index)
    keys, values = (
        [torch.cat(rows) for rows in zip(*(getattr(prefix, name) for prefix in present))] for name in ("keys", "values")
    )
    lengths = torch.stack([prefix.offsets[1] for prefix in present])
    return LayerPrefix(keys, values, to_offsets(lengths), index)


def encode_each(backbone: Backbone, batch: PackedBatch, tasks: dict[str, Task]) -> Iterator[tuple[str, Encoded]]:
    """The histories as each task reads them, in any order; few of them exist at a time.

    Two tasks or more without a prefix share what no tail prompt reaches.
    """
    several = len(tasks) > 1
    shared = {name: task for name, task in tasks.items() if several and not task.has_prefix}
    if len(shared) == 1:
        shared = {}
    for name, task in tasks.items():
        if name not in shared:
            yield name, encode_rows(backbone, batch, [task])
    if not shared:
        return
    every_state = any(task.every_state for task in shared.values())
    plain, tails, longest = _tails(shared)
    if tails:
        yield from _read_tails(Trunk.of(backbone, batch, longest, every_state=every_state), shared, plain, tails)
        return
    encoded = encode(backbone, batch, every_state=every_state)
    yield from ((name, encoded) for name in plain)


def encode_state(state: UserState, tasks: dict[str, Task]) -> Iterator[tuple[str, Encoded]]:
    """As `encode_each`, of histories that are known already; ValueError where a task reads what the state lacks."""
    for name, task in tasks.items():
        _check_state(state, name, task)
    plain, tails, longest = _tails(tasks)
    if plain:
        encoded = state.read()
        yield from ((name, encoded) for name in plain)
    if tails:
        trunk = state.trunk(longest, every_state=any(task.every_state for task in tasks.values()))
        yield from _read_tails(trunk, tasks, [], tails)


def _tails(tasks: dict[str, Task]) -> tuple[list[str], list[str], int]:
    """The tasks without a tail prompt, those with one, and the longest one's rows."""
    rows = {name: task.tail() for name, task in tasks.items()}
    plain = [name for name, tail in rows.items() if tail is None]
    longest = _longest(rows.values())
    return plain, [name for name in tasks if name not in plain], longest


def _longest(tails: Iterable[Tensor | None]) -> int:
    """Rows of the longest tail; 0 where there is none. torch.compile breaks its graph at max(..., default=)."""
    return max([0, *(len(tail) for tail in tails if tail is not None)])


def _check_state(state: UserState, name: str, task: Task) -> None:
    if task.has_prefix:
        raise ValueError(
            f"task {name!r} has a prefix, which every row of a history sees, and a UserState holds rows "
            "without one; read state.batch() instead"
        )
    if task.every_state and not state.every_state:
        raise ValueError(f"task {name!r} reads the states of all rows; make the UserState with every_state=True")


def _read_tails(
    trunk: Trunk, tasks: dict[str, Task], plain: list[str], tails: list[str]
) -> Iterator[tuple[str, Encoded]]:
    """Every way to read a trunk, and the tasks that read it so: one way for all `plain` ones, one for each with a tail.

    What reads the newest states alone is kept apart from what reads all of them.
    """
    users = len(trunk.offsets) - 1
    for every_state in (False, True):
        ways = [
            [name for name in way if tasks[name].every_state == every_state]
            for way in [plain, *([name] for name in tails)]
        ]
        ways = [way for way in ways if way]
        step = max(1, TAIL_ROWS // max(len(trunk.tail_items), 1))
        for first in range(0, len(ways), step):
            part = ways[first : first + step]
            index = torch.arange(len(part), device=trunk.offsets.device).repeat_interleave(users)
            prompt, index = _stack_tails([tasks[names[0]] for names in part], index)
            for names, encoded in zip(
                part, trunk.read(prompt, None if prompt is None else index, every_state, len(part))
            ):
                yield from ((name, encoded) for name in names)


def _stack_tails(tasks: list[Task], index: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Tail prompts as one [K, P, D] (shorter ones padded with zero rows at the old end) and the prompt of each row."""
    tails = [task.tail() for task in tasks]
    if index is None:
        return None if tails[0] is None else tails[0][None], None
    longest = _longest(tails)
    if not longest:
        return None, None
    padded = [nn.functional.pad(tail, (0, 0, longest - len(tail), 0)) for tail in tails if tail is not None]
    return torch.stack(padded), _among_present(tails, index)


def _among_present(given: list, index: Tensor) -> Tensor:
    """index [B] into what is given for each task, as an index into what is there; -1 where that is None."""
    number, there = [], 0
    for one in given:
        number.append(-1 if one is None else there)
        there += one is not None
    return torch.tensor(number, device="cpu").to(index.device, non_blocking=True)[index]
