"""A dataset encoded by any number of processes, killed at any time: each user once, none missing, the same bits."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from stores import add, make_model

from pcl_ext import Predictor, from_pretrained, save_pretrained
from pcl_ext.data import Dataset, DatasetWriter
from pcl_ext.serve import encode

FORK = multiprocessing.get_context("fork")  # a second process at once: torch is imported already
GROUPS, USERS = 12, 25


class Crash(BaseException):
    """Nothing catches it on the way, as nothing catches a power cut."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, a dataset of some row groups, their vectors by a plain pass."""
    folder = tmp_path_factory.mktemp("encode")
    save_pretrained(make_model("next", "ctr", "age"), folder / "run")
    return folder / "run", write_dataset(folder / "data")


def write_dataset(path, seed=0):
    rng = np.random.default_rng(seed)
    with DatasetWriter(path, "shop", 22) as writer:  # the run knows items 1..20
        for group in range(GROUPS):
            lengths = rng.integers(0, 12, USERS)
            offsets = np.concatenate([[0], lengths.cumsum()])
            ids = 1000 - group * USERS - np.arange(USERS)  # not sorted
            writer.histories(ids, rng.integers(1, 23, offsets[-1]), offsets, rng.integers(0, 3, USERS))
    return Dataset(path)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(encode, "SHARD_USERS", 10)
    torch.set_num_threads(1)


def job(made, out, tasks=("ctr", "age")):
    return encode.EncodeJob(Predictor(made[0]), made[1], out, tasks)


@pytest.fixture(scope="module")
def want(made, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "SHARD_USERS", 10)
        torch.set_num_threads(1)
        out = tmp_path_factory.mktemp("whole") / "users.parquet"
        share = job(made, out).run()
    assert share.complete
    assert share.users == GROUPS * USERS
    assert share.unknown == int((made[1].items > 20).sum()) > 0
    return pq.read_table(out)


def check(out, want):
    assert pq.read_table(out).equals(want)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_file_is_what_a_predictor_gives(made, want):
    run, dataset = made
    assert want["user_id"].to_pylist() == dataset.user_id.tolist()
    vectors = Predictor(run).encode({"values": dataset.items, "offsets": dataset.offsets}, ["ctr", "age"])
    for task, rows in vectors.items():
        torch.testing.assert_close(torch.tensor(want[task].to_pylist()), torch.from_numpy(rows))


def test_shards_are_of_one_size_however_the_dataset_was_written(made, tmp_path):
    shards = job(made, tmp_path / "users.parquet").shards
    assert [row for shard in shards for row in shard] == list(range(GROUPS * USERS))
    assert [len(shard) for shard in shards] == [10] * 30


def test_processes_share_the_work(made, want, tmp_path):
    out = tmp_path / "users.parquet"
    shares = [job(made, out).run(rank, 5) for rank in (3, 0, 4, 2, 1)]
    assert [share.complete for share in shares] == [False] * 4 + [True]
    assert sum(share.users for share in shares) == GROUPS * USERS
    check(out, want)
    again = job(made, out).run()
    assert (again.users, again.complete, again.unknown) == (0, True, shares[-1].unknown)


def test_another_number_of_processes_goes_on(made, want, tmp_path):
    out = tmp_path / "users.parquet"
    first = job(made, out).run(1, 3).users
    assert 0 < first < GROUPS * USERS
    assert job(made, out).run().users == GROUPS * USERS - first
    check(out, want)


@pytest.mark.parametrize("name", ["fsync", "replace", "link"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_every_step(made, want, tmp_path, monkeypatch, name, after):
    monkeypatch.setattr(encode, "SHARD_USERS", 100)
    real, out, step, crashes = getattr(os, name), tmp_path / "users.parquet", 0, 0
    users = 0
    while not out.exists() or step == 0:
        step, calls = step + 1, []

        def crash(*args, step=step, calls=calls):
            calls.append(args)
            if len(calls) == 2 or name == "link":
                if after:
                    real(*args)
                raise Crash
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, crash)
            try:
                users += job(made, out).run().users
            except Crash:
                crashes += 1
        if name == "link" and crashes == 2:
            job(made, out).run()
    assert crashes >= (1 if name == "link" and after else 2)
    job(made, out).run()
    assert pq.read_table(out)["user_id"].equals(want["user_id"])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def slowly(made, out, rank, world_size):
    """A process's share, with time to be killed at any step."""
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        setattr(os, name, lambda *args, real=real: (time.sleep(0.002), real(*args), time.sleep(0.002))[1])
    torch.set_num_threads(1)
    job(made, out).run(rank, world_size)


def kill_and_restart(made, want, out, kills, world_size):
    before = []
    for _ in range(kills):
        children = [FORK.Process(target=slowly, args=(made, out, rank, world_size)) for rank in range(world_size)]
        for child in children:
            child.start()
        time.sleep(random.uniform(0.02, 0.16))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        before.append(out.exists() or len(list(out.parent.glob("*.parts/part-*"))))
    for rank in range(world_size):
        share = job(made, out).run(rank, world_size)
    assert share.complete
    check(out, want)
    return before


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_and_restarted(made, want, tmp_path, world_size):
    kill_and_restart(made, want, tmp_path / "users.parquet", 4, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_twenty_times_and_restarted(made, want, tmp_path, monkeypatch, world_size):
    monkeypatch.setattr(encode, "SHARD_USERS", 3)
    progress = kill_and_restart(made, want, tmp_path / "users.parquet", 20, world_size)
    assert len(set(progress)) > 5  # killed at many places of the work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks", "was made from another tasks"),
        ("order", "was made from another tasks"),
        ("dataset", "was made from another dataset"),
    ],
)
@pytest.mark.parametrize("done", [True, False], ids=["complete", "begun"])
def test_another_job_is_refused(made, tmp_path, change, message, done):
    out = tmp_path / "users.parquet"
    job(made, out).run(0, 1 if done else 2)
    given = (made[0], write_dataset(tmp_path / "other", seed=1)) if change == "dataset" else made
    other = job(given, out, {"tasks": ["ctr"], "order": ["age", "ctr"]}.get(change, ("ctr", "age")))
    with pytest.raises(ValueError, match=f"{message} .* remove it, or choose another file"):
        other.run()


def test_a_predictor_that_has_an_older_save_of_the_run_open_is_refused(made, tmp_path):
    """Its vectors would not be those that the identity of the file speaks of."""
    run = shutil.copytree(made[0], tmp_path / "run")
    predictor, model = Predictor(run), from_pretrained(run)
    predictor.encode([[1]])
    model.remove_task("ctr")
    add(model, "ctr")
    save_pretrained(model, run)
    assert encode.EncodeJob(predictor, made[1], tmp_path / "age.parquet", ["age"]).run().complete
    out = tmp_path / "ctr.parquet"
    with pytest.raises(ValueError, match=r"run has been saved anew meanwhile; start again, with a new Predictor"):
        encode.EncodeJob(predictor, made[1], out, ["ctr"]).run()
    assert not Path(f"{out}.parts").exists()
    assert encode.EncodeJob(Predictor(run), made[1], out, ["ctr"]).run().complete


@pytest.mark.parametrize("tasks", [["ctr", "age", "ctr"], ["ctr", "ctr"]])
def test_a_task_that_is_named_twice_is_refused(made, tmp_path, tasks):
    with pytest.raises(ValueError, match=f"each once, got {', '.join(tasks)}"):
        job(made, tmp_path / "users.parquet", tasks)


def test_a_process_that_is_there_already(made, tmp_path):
    out = tmp_path / "users.parquet"
    one = job(made, out)
    one.parts.mkdir()
    with encode.locked(one.parts / "rank-0-of-1.lock", "in use", "wait"):
        with pytest.raises(ValueError, match="users.parquet.parts is in use by process"):
            job(made, out).run()


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1)])
def test_a_rank_that_cannot_be(made, tmp_path, rank, world_size):
    with pytest.raises(ValueError, match=f"rank must be in 0..{world_size - 1}, got {rank}"):
        job(made, tmp_path / "users.parquet").run(rank, world_size)


def test_a_file_that_another_process_finished_between_a_look_and_the_lock(made, want, tmp_path, monkeypatch):
    out, real = tmp_path / "users.parquet", encode.locked
    late = job(made, out)
    job(made, out).run(0, 2)

    def slow(path, *words):
        if path.name == "finish.lock":
            monkeypatch.setattr(encode, "locked", real)
            assert job(made, out).run(1, 2).complete
            late.parts.mkdir()  # as if the lock were opened before the folder went
        return real(path, *words)

    late._write_parts(late.shards[1::2], "")
    monkeypatch.setattr(encode, "locked", slow)
    assert late._finish()
    check(out, want)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_folder_without_hard_links(made, want, tmp_path, monkeypatch, number):
    def refuse(*paths):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "users.parquet"
    assert not job(made, out).run(0, 2).complete
    assert job(made, out).run(1, 2).complete
    check(out, want)


def test_a_folder_of_parts_that_no_job_made_is_left_alone(made, want, tmp_path):
    out = tmp_path / "users.parquet"
    precious = tmp_path / "users.parquet.parts" / "precious"
    precious.parent.mkdir()
    precious.write_text("precious")
    with pytest.raises(ValueError, match=r"parts holds precious and was not made by pcl encode; move it, or choose"):
        job(made, out).run()
    (precious.parent / "job.json").write_text("not JSON")
    with pytest.raises(ValueError, match=r"parts was made from another backbone \(None, .* remove it, or choose"):
        job(made, out).run()
    (precious.parent / "job.json").unlink()
    precious.rename(tmp_path / "precious")
    job(made, out).run(0, 2)
    (tmp_path / "precious").rename(precious)
    assert job(made, out).run(1, 2).complete
    assert job(made, out).run().complete
    assert pq.read_table(out).equals(want)
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]


@pytest.mark.parametrize("left", [["finish.lock"], [".pcl-0123456789abcdef.tmp"], []], ids=str)
def test_what_a_process_leaves_that_was_killed_at_its_start_or_end_is_no_obstacle(made, want, tmp_path, left):
    out = tmp_path / "users.parquet"
    for _ in range(2):
        job(made, out).parts.mkdir()
        for name in left:
            (job(made, out).parts / name).touch()
        assert job(made, out).run().complete
    check(out, want)


def test_the_mark_of_a_job_is_removed_last(made, tmp_path, monkeypatch):
    gone, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (gone.append(path.name), unlink(path, **how))[1])
    job(made, tmp_path / "users.parquet").run()
    assert gone[-1] == "job.json"


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropped_ids_are_those_of_the_job(made, tmp_path, world_size):
    """Not those that the predictor has dropped for others before."""
    predictor = Predictor(made[0])
    predictor.predict([[99, 98]], "ctr")
    dataset, offsets = made[1], made[1].offsets
    share = encode.EncodeJob(predictor, dataset, tmp_path / "users.parquet", ["ctr"]).run(0, world_size)
    rows = [row for at in range(0, GROUPS * USERS, 10 * world_size) for row in range(at, at + 10)]
    mine = rows if world_size == 2 else range(GROUPS * USERS)
    assert share.unknown == sum(int((dataset.items[offsets[row] : offsets[row + 1]] > 20).sum()) for row in mine)


def test_a_full_disk_is_named(made, tmp_path, monkeypatch):
    class Full(encode.pq.ParquetWriter):
        def write_table(self, table):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode.pq, "ParquetWriter", Full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/users.parquet.parts'"):
        job(made, tmp_path / "users.parquet").run()
