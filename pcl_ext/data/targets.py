"""Targets of an items task: events of the log, what is visible before them, and what to leave out."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from pcl_ext.data.coded import gather
from pcl_ext.data.config import TaskConfig
from pcl_ext.data.examples import user_chunks
from pcl_ext.data.log import EventLog, first_of_pairs

_LOG = logging.getLogger(__name__)
_EVENTS = 1 << 20  # of the histories that are looked through at a time


class ItemTargets(NamedTuple):
    """One row per target: row of the user, code of the item, cut, and time (None where it may precede the cut)."""

    user: np.ndarray
    item: np.ndarray
    cut: np.ndarray
    time: np.ndarray | None
    catalogue: np.ndarray | None


def item_targets(log: EventLog, task: TaskConfig) -> ItemTargets:
    """Raises ValueError where no target is left."""
    label = f"task {task.name!r}"
    kept, start, catalogue = task_events(log, task)
    chosen = log.ordered(kept)
    user, item = log.row_of[log.user.codes[chosen]], log.item.codes[chosen]
    if task.cut == "end":
        cut = log.offsets[user + 1] - log.offsets[user]
        wanted = first_of_pairs(user, item, len(log.item)) if task.pick == "all" else np.ones(len(user), bool)
    else:
        cut = _shown_before(log, kept) - log.offsets[user]
        wanted = np.flatnonzero(cut > 0)
        if task.pick == "all":  # an item that is bought twice between two events of the history
            place = np.cumsum(np.diff(user[wanted], prepend=-1) | np.diff(cut[wanted], prepend=-1) != 0)
            wanted = wanted[first_of_pairs(place, item[wanted], len(log.item))]
    chosen, user, item, cut = chosen[wanted], user[wanted], item[wanted], cut[wanted]
    if not task.repeats:
        fresh = ~_visible(log, user, item, cut)
        if left_out := len(fresh) - int(fresh.sum()):
            what = "%s: targets left out, items of the visible history: %d of %d; repeats = true keeps them"
            _LOG.info(what, label, left_out, len(fresh))
        chosen, user, item, cut = chosen[fresh], user[fresh], item[fresh], cut[fresh]
    if task.pick != "all":
        side = np.diff(user, prepend=-1) if task.pick == "first" else np.diff(user, append=-1)
        picked = side != 0
        chosen, user, item, cut = chosen[picked], user[picked], item[picked], cut[picked]
    if not len(user):
        raise ValueError(
            f"{label}: every event that satisfies where, from, until and items is part of the visible history, or has "
            "none before it: hold `items` out, start after [events] until, or say repeats = true"
        )
    after = task.cut == "before" or start is not None
    return ItemTargets(user, item, cut, log.time[chosen] if after and log.config.events.time else None, catalogue)


def task_events(log: EventLog, task: TaskConfig) -> tuple[np.ndarray, int | None, np.ndarray | None]:
    """[E] bool, the events of kept users that a task is about; its `from`; and [all items] bool, its `items`.

    ValueError where there is none, or where the whole of a history is visible and shows events that are not before
    `from`.
    """
    label = f"task {task.name!r}"
    start, until = log.bound(task.start, f"{label}: from"), log.bound(task.until, f"{label}: until")
    kept = log.mask(task.where, f"{label}: where", start, until)
    kept &= gather(log.row_of >= 0, log.user.codes)
    items = None
    if task.items is not None:
        items = log.subset(task.items, f"{label}: items")
        kept &= gather(items, log.item.codes)
    if task.cut == "end" and start is not None:
        _check_window(log, task, start)
    if not kept.any():
        raise ValueError(f"{label}: no event satisfies where, from, until and items")
    return kept, start, items


def _shown_before(log: EventLog, kept: np.ndarray) -> np.ndarray:
    """How many events of the histories, all users back to back, come before each of the kept ones, in their order."""
    shown = gather(log.shown, log.order)
    before = np.cumsum(shown, dtype=log.order.dtype) - shown
    return before[gather(kept, log.order)]


def _check_window(log: EventLog, task: TaskConfig, start: int) -> None:
    """A task with `from` is about what comes after the histories: whatever they show has to lie before it."""
    if seen := np.count_nonzero(log.time[log.shown] >= start):
        ends = "have no end" if log.until is None else f"end at {log.config.events.until}"
        other = "leave `from` out where the label is to describe what is visible"
        if task.kind == "items":
            other = 'cut = "before", or leave `from` out where the targets are held out and say nothing of the time'
        raise ValueError(
            f"task {task.name!r}: {seen} events of the histories, which {ends}, are not before its `from`, "
            f"{task.start}: they would be visible. Write [events] until = {task.start}, or {other}"
        )


def _visible(log: EventLog, user: np.ndarray, item: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """[m] bool: the item is among the first `cut` of the user's history; `user` never decreases. Some users at a time:
    sorting all events at once would take several times their memory."""
    found, width = np.zeros(len(user), bool), len(log.item)
    for begin, end in user_chunks(log.offsets, _EVENTS):
        first, last = log.offsets[begin], log.offsets[end]
        owner = np.repeat(np.arange(begin, end), np.diff(log.offsets[begin : end + 1]))
        keys, place = np.unique(owner * width + log.item.codes[log.history[first:last]], return_index=True)
        rows = slice(*np.searchsorted(user, [begin, end]))
        wanted = user[rows] * width + item[rows]
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        found[rows] = (keys[at] == wanted) & (first + place[at] - log.offsets[user[rows]] < cut[rows])
    return found
