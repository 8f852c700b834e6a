"""Predictions for a whole dataset: what a Predictor gives, in a file, over any number of processes and kills."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stores import SPECS, make_model

from pcl_ext import MemoryConfig, Predictor, TaskSpec, save_pretrained
from pcl_ext.data import Dataset, DatasetWriter
from pcl_ext.serve import ItemIds, encode

TASKS = [*SPECS, "city"]
USERS = 35


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a task of every kind, one of them with labels, and a dataset of 35 users."""
    folder, model = tmp_path_factory.mktemp("predict"), make_model(*SPECS)
    model.add_task(TaskSpec("city", "classes", num_classes=2, labels=("Oslo", "Rome")), MemoryConfig(placement="none"))
    model.freeze_task("city")
    save_pretrained(model, folder / "run")
    rng = np.random.default_rng(0)
    with DatasetWriter(folder / "data", "shop", 22) as writer:  # the run knows items 1..20
        offsets = np.concatenate([[0], rng.integers(0, 12, USERS).cumsum()])
        writer.histories(np.arange(USERS) + 7, rng.integers(1, 23, offsets[-1]), offsets, rng.integers(0, 3, USERS))
    return folder / "run", Dataset(folder / "data")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(encode, "SHARD_USERS", 10)
    torch.set_num_threads(1)


def job(made, out, task, **settings):
    return encode.PredictJob(Predictor(made[0], task), made[1], out, task, **settings)


@pytest.mark.parametrize("task", TASKS)
def test_the_file_is_what_a_predictor_answers(made, tmp_path, task):
    run, dataset = made
    share = job(made, tmp_path / "all.parquet", task, k=5).run()
    assert (share.users, share.unknown, share.complete) == (USERS, int((dataset.items > 20).sum()), True)
    table, predictor = pq.read_table(tmp_path / "all.parquet"), Predictor(run)
    assert table["user_id"].to_pylist() == dataset.user_id.tolist()
    for first in range(0, USERS, encode.SHARD_USERS):  # as many at once: products round otherwise in other company
        offsets = dataset.offsets[first : first + encode.SHARD_USERS + 1]
        values = dataset.items[offsets[0] : offsets[-1]]
        want = predictor.predict({"values": values, "offsets": offsets - offsets[0]}, task, 5)
        want.pop("unknown")
        assert table.column_names == ["user_id", *want]
        there = want["items"] > 0 if "items" in want else None
        for name, column in want.items():
            rows = list(column) if there is None else [row[mask] for row, mask in zip(column, there, strict=True)]
            assert table[name][first : first + encode.SHARD_USERS].to_pylist() == [row.tolist() for row in rows]


def test_the_logs_own_ids_come_out_and_seen_items_are_left_out(made, tmp_path):
    ids = pa.table({"item_id": pa.array(range(1, 21), pa.int32()), "original_id": [f"sku-{n}" for n in range(1, 21)]})
    pq.write_table(ids, tmp_path / "items.parquet")
    named = {"skip_seen": True, "ids": ItemIds(tmp_path / "items.parquet")}
    job(made, tmp_path / "all.parquet", "next", k=20, **named).run()
    rows = pq.read_table(tmp_path / "all.parquet")["items"].to_pylist()
    dataset = made[1]
    for user, row in enumerate(rows):
        seen = {f"sku-{item}" for item in dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]}
        assert len(row) == len(set(row)) == 20 - len(seen & set(ids["original_id"].to_pylist()))
        assert not seen & set(row)


def test_another_job_on_the_same_file_is_refused(made, tmp_path):
    out = tmp_path / "all.parquet"
    job(made, out, "next", k=5).run()
    assert job(made, out, "next", k=5).run().users == 0
    for task, settings in (("next", {"k": 6}), ("next", {"k": 5, "skip_seen": True}), ("ctr", {})):
        with pytest.raises(ValueError, match=r"all\.parquet was made from another (settings|tasks)"):
            job(made, out, task, **settings).run()
    with pytest.raises(ValueError, match="tasks must be among next, .*, got 'churn'"):
        encode.PredictJob(Predictor(made[0]), made[1], out, "churn")


@pytest.mark.parametrize("task", ["next", "ctr"])
def test_vectors_and_predictions_are_not_taken_for_each_other(made, tmp_path, task):
    """Finished files, and parts of a job that was killed."""

    def vectors(out):
        return encode.EncodeJob(Predictor(made[0]), made[1], out, [task])

    def predictions(out):
        return job(made, out, task)

    for place, (one, other) in enumerate(((vectors, predictions), (predictions, vectors))):
        for processes in (1, 3):
            out = tmp_path / f"{place}-{processes}.parquet"
            one(out).run(0, processes)
            with pytest.raises(ValueError, match="was made from another settings"):
                other(out).run(0, processes)


def test_a_wrong_k_is_refused_before_anything_is_claimed(made, tmp_path):
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        job(made, tmp_path / "all.parquet", "next", k=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", [10**6, 2**63])
def test_numbers_come_out_as_numbers_where_an_int64_holds_them(made, tmp_path, base):
    ids = pa.table({"item_id": pa.array(range(1, 21), pa.int32()), "original_id": [str(base + n) for n in range(20)]})
    pq.write_table(ids, tmp_path / "items.parquet")
    job(made, tmp_path / "all.parquet", "next", k=2, ids=ItemIds(tmp_path / "items.parquet")).run()
    table = pq.read_table(tmp_path / "all.parquet")
    assert table.schema.field("items").type.value_type == (pa.int64() if base < 2**62 else pa.string())
    assert {int(item) - base for row in table["items"].to_pylist() for item in row} <= set(range(20))


def test_processes_share_the_users(made, tmp_path):
    shares = [job(made, tmp_path / "all.parquet", "ctr").run(rank, 3) for rank in range(3)]
    assert [share.users for share in shares] == [15, 10, 10]
    assert [share.complete for share in shares] == [False, False, True]
    assert len(pq.read_table(tmp_path / "all.parquet")) == USERS
