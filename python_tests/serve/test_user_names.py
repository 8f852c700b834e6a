"""What the log calls its users stands beside their numbers in the files that jobs write."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import make_model

from pcl_ext import Predictor, TaskSpec, save_pretrained
from pcl_ext.data import Dataset, DatasetWriter
from pcl_ext.serve import encode, user_names
from pcl_ext.serve.encode import EncodeJob, PredictJob

USERS = [40, 7, 30, 9, 20]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run, and a dataset of five users in an order of their own."""
    monkeypatch.setattr(encode, "SHARD_USERS", 2)
    save_pretrained(make_model("next", "ctr"), tmp_path / "run")
    with DatasetWriter(tmp_path / "data", "shop", 20) as writer:
        writer.histories(USERS, np.arange(10) + 1, np.arange(6) * 2, [0, 0, 1, 2, 2])
    return tmp_path / "run", tmp_path / "data"


def name(folder, users, names):
    pq.write_table(pa.table({"user_id": users, "original_id": names}), folder / "users.parquet")


def jobs(made, out):
    run, dataset = Predictor(made[0]), Dataset(made[1])
    return {
        "encode": EncodeJob(run, dataset, out / "encode.parquet", ["ctr"]),
        "predict": PredictJob(run, dataset, out / "predict.parquet", "ctr"),
        "items": PredictJob(run, dataset, out / "items.parquet", "next"),
    }


@pytest.mark.parametrize("rows", [1, 2, 1 << 16])
def test_names_of_users_in_any_order(made, tmp_path, monkeypatch, rows):
    """One user has no name, one name no user."""
    monkeypatch.setattr(user_names, "_ROWS", rows)
    name(made[1], [7, 9, 99, 30, 40], ["ann", "bob", "nobody", "cem", "dia"])
    columns = {"encode": ["ctr"], "predict": ["probability"], "items": ["items", "scores"]}
    for kind, job in jobs(made, tmp_path).items():
        job.run(1, 2)
        assert job.run(0, 2).complete
        table = pq.read_table(job.out)
        assert table.column_names == ["user_id", *columns[kind], "original_id"]
        assert table["user_id"].to_pylist() == USERS
        assert table["original_id"].to_pylist() == ["dia", "ann", "cem", "bob", None]
        assert table.schema.field("original_id").type == pa.string()


@pytest.mark.parametrize("other", [None, {"user_id": [7], "age": [30]}])
def test_without_names_there_is_no_column(made, tmp_path, other):
    if other:
        pq.write_table(pa.table(other), made[1] / "users.parquet")
    job = jobs(made, tmp_path)["encode"]
    job.run()
    assert pq.read_schema(job.out).names == ["user_id", "ctr"]


@pytest.mark.parametrize("processes", [1, 2], ids=["complete", "begun"])
def test_a_job_of_other_names_is_another(made, tmp_path, processes):
    """So is one of before, without names."""
    for names in (["a", "b", "c", "d", "e"], ["a", "b", "c", "d", "f"]):
        jobs(made, tmp_path)["encode"].run(0, processes)
        name(made[1], USERS, names)
        with pytest.raises(ValueError, match="was made from another users .* remove it, or choose another file"):
            jobs(made, tmp_path)["encode"].run()
        for path in tmp_path.glob("encode.parquet*"):
            path.unlink() if path.is_file() else path.rename(tmp_path / names[-1])


def test_tables_that_name_no_users_are_refused(made, tmp_path):
    name(made[1], [7, 9, 7], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"users\.parquet: user_id must name every user once, got one twice"):
        jobs(made, tmp_path)
    name(made[1], ["x"], ["a"])
    with pytest.raises(ValueError, match=r"users\.parquet: user_id must hold integers, original_id integers or text"):
        jobs(made, tmp_path)


def test_a_task_that_is_called_as_the_column_is_refused(made, tmp_path):
    model = make_model()
    model.add_task(TaskSpec("original_id", "binary"))
    model.freeze_task("original_id")
    save_pretrained(model, tmp_path / "other")
    EncodeJob(Predictor(tmp_path / "other"), Dataset(made[1]), tmp_path / "out.parquet")
    name(made[1], USERS, ["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="tasks name the columns beside user_id and original_id, each once, got orig"):
        EncodeJob(Predictor(tmp_path / "other"), Dataset(made[1]), tmp_path / "out.parquet")
