"""A save that is interrupted, at any point and by any means, leaves the old state or the new one."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from stores import RECORD, SPECS, add, files, hashes, make_model

from pcl_ext.store import StoreError, from_pretrained, read_manifest, save_pretrained, verify

FORK = multiprocessing.get_context("fork")  # a second process at once: torch is imported already


class Crash(BaseException):
    """Nothing catches it on the way, as nothing catches a power cut."""


def states(tmp_path):
    """A run with one task, the model it holds, and a model that has learned two more."""
    old = make_model("next")
    save_pretrained(old, tmp_path, RECORD)
    new = from_pretrained(tmp_path)
    add(new, "ctr")
    add(new, "age")
    return old, new


def save_back(old, path, record):
    """Take the run back to the time before two tasks were learned."""
    old.removed |= {"ctr", "age"}
    save_pretrained(old, path, record)


def crash_at(patch, step, name, after, cleanup):
    """Let the call number `step` of os.<name> crash, before or after it has done its work; `cleanup` says whether what
    a save does on its way out still happens."""
    real, unlink, calls = getattr(os, name), Path.unlink, []

    def crash(*args):
        calls.append(args)
        if len(calls) < step:
            return real(*args)
        if after:
            real(*args)
        raise Crash

    def unlink_unless_crashed(*args, **kwargs):
        if cleanup or len(calls) < step:
            unlink(*args, **kwargs)

    patch.setattr(os, name, crash)
    patch.setattr(Path, "unlink", unlink_unless_crashed)


@pytest.mark.parametrize("cleanup", [True, False], ids=["raised", "cut"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_crash_at_every_step(tmp_path, monkeypatch, name, after, cleanup):
    old, new = states(tmp_path)
    step, seen = 0, set()
    while "done" not in seen:
        step += 1
        with monkeypatch.context() as patch:
            crash_at(patch, step, name, after, cleanup)
            try:
                save_pretrained(new, tmp_path, {"new": True})
                seen.add("done")
            except Crash:
                pass
        got = hashes(from_pretrained(tmp_path))
        assert got in (hashes(old), hashes(new))
        assert read_manifest(tmp_path)["record"] == ({"new": True} if got == hashes(new) else RECORD)
        seen.add("new" if got == hashes(new) else "old")
        if got == hashes(new) and "done" not in seen:
            save_back(old, tmp_path, RECORD)  # back to the start, for the next step
    assert step > (6 if name == "fsync" else 3)
    assert "old" in seen or after
    save_pretrained(new, tmp_path)
    save_pretrained(new, tmp_path)
    assert len(files(tmp_path)) == 2 + len(new.task_names)  # nothing is left over
    verify(tmp_path)


def save_forever(path, old, new):
    while True:
        save_pretrained(new, path, {"tasks": new.task_names})
        save_back(old, path, {"tasks": old.task_names})


def kill_while_saving(path, kills):
    old, new = states(path)
    want = {tuple(model.task_names): hashes(model) for model in (old, new)}
    began = time.monotonic()
    save_pretrained(new, path)
    save_back(old, path, RECORD)
    longest = 2 * (time.monotonic() - began)  # on a machine with other work saving takes several times as long
    seen = set()
    for _ in range(kills):
        child = FORK.Process(target=save_forever, args=(path, old, new))
        child.start()
        time.sleep(random.uniform(0, longest))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        got = from_pretrained(path)
        assert hashes(got) == want[tuple(got.task_names)]
        assert read_manifest(path)["record"] in (RECORD, {"tasks": got.task_names})
        seen.add(tuple(got.task_names))
    save_pretrained(new, path)
    save_pretrained(new, path)
    assert len(files(path)) == 2 + len(new.task_names)
    return seen


def test_killed_while_saving(tmp_path):
    kill_while_saving(tmp_path, 10)


@pytest.mark.slow
def test_killed_while_saving_a_thousand_times(tmp_path):
    assert len(kill_while_saving(tmp_path, 1000)) == 2


def save_often(path, model, answers):
    refused = 0
    for place in range(30):
        try:
            save_pretrained(model, path, {"task": model.task_names[-1], "save": place})
        except StoreError as error:
            refused += 1
            if "is being saved to by" not in str(error) and "does not hold closed" not in str(error):
                answers.put(str(error))
    answers.put(refused)


def test_of_two_processes_saving_at_once_the_first_is_not_lost(tmp_path):
    old, _ = states(tmp_path)
    models = []
    for name in ("ctr", "age"):
        models.append(from_pretrained(tmp_path))
        add(models[-1], name)
    answers = FORK.Queue()
    children = [FORK.Process(target=save_often, args=(tmp_path, model, answers)) for model in models]
    for child in children:
        child.start()
    refused = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert all(isinstance(count, int) for count in refused), refused
    got = from_pretrained(tmp_path)
    assert hashes(got) in [hashes(model) for model in models]
    assert read_manifest(tmp_path)["record"]["task"] == got.task_names[-1]
    assert set(got.task_names) < set(SPECS)
    assert old.task_names == ["next"]
