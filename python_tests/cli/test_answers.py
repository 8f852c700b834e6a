"""`pcl predict` and `pcl encode`: what they print, and what they write."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pcl_ext import PackedBatch, store
from pcl_ext.data import Dataset

HISTORIES = [[1, 2, 3], [], [4] * 30, [7, 999, -1, 8]]
ANSWERS = {
    "next": {"items", "scores"},
    "range": {"items", "scores"},
    "click": {"probability"},
    "segment": {"class", "probabilities"},
    "spend": {"value"},
}


@pytest.mark.parametrize("task", ANSWERS)
def test_predict(made, pcl, task):
    lines = "".join(json.dumps(history) + "\n" for history in HISTORIES)
    status, out, err = pcl("predict", made.run, "--task", task, "--k", 4, stdin=lines)
    assert status == 0
    assert err == ["pcl predict: 2 unknown item ids were dropped from 4 histories"]
    answers = [json.loads(line) for line in out]
    assert [set(answer) for answer in answers] == [ANSWERS[task]] * 4
    if "items" in ANSWERS[task]:
        assert all(len(set(answer["items"])) == len(answer["scores"]) == 4 for answer in answers)
        assert all(answer["scores"] == sorted(answer["scores"], reverse=True) for answer in answers)
    catalogue = Dataset(made.data).task("range").spec.catalogue
    assert task != "range" or all(set(answer["items"]) <= set(catalogue) for answer in answers)


@pytest.mark.parametrize(
    "own",
    [lambda item: 7000 - item, lambda item: f"sku-{item}", lambda item: 2**64 + item],
    ids=["numbers", "text", "hashes"],
)
def test_predict_takes_and_answers_the_logs_own_ids(made, pcl, tmp_path, own):
    count = Dataset(made.data).num_items
    ids = pa.table({"item_id": range(1, count + 1), "original_id": [str(own(item)) for item in range(1, count + 1)]})
    pq.write_table(ids, tmp_path / "items.parquet")
    lines = "".join(json.dumps(ids) + "\n" for ids in ([own(1), own(2)], [], [own(4), "unheard of"]))
    status, out, err = pcl("predict", made.run, "--task", "next", "--item-ids", tmp_path / "items.parquet", stdin=lines)
    assert (status, err) == (0, ["pcl predict: 1 unknown item ids were dropped from 3 histories"])
    want = store.from_pretrained(made.run).predict([[1, 2], [], [4]], "next")
    assert [json.loads(line)["items"] for line in out] == [[own(item) for item in row["items"]] for row in want]


def test_the_ids_of_another_dataset_are_refused(made, refused, tmp_path):
    pq.write_table(pa.table({"item_id": [1, 2], "original_id": ["a", "b"]}), tmp_path / "items.parquet")
    line = refused("predict", made.run, "--task", "next", "--item-ids", tmp_path / "items.parquet", stdin='["a"]\n')
    assert f"must name the items 1..{Dataset(made.data).num_items} of the run's dataset, it names 2" in line


def test_predict_keeps_the_order_of_many_lines(made, pcl):
    histories = [[1 + n % 50] * (n % 3) + [1 + n % 7] for n in range(1100)]
    status, out, err = pcl("predict", made.run, "--task", "spend", stdin="\n".join(map(json.dumps, histories)))
    assert (status, err, len(out)) == (0, [], 1100)
    values = torch.tensor([json.loads(line)["value"] for line in out])
    model = store.from_pretrained(made.run)
    want = torch.tensor([model.predict([history], "spend")[0]["value"] for history in histories[::50]])
    torch.testing.assert_close(values[::50], want)
    assert len(values.unique()) > 100


def test_predict_of_nothing_is_nothing(made, pcl):
    assert pcl("predict", made.run, "--task", "click") == (0, [], [])


def test_predict_without_seen_items(made, pcl):
    lines = "".join(json.dumps(history) + "\n" for history in HISTORIES)
    status, out, _ = pcl("predict", made.run, "--task", "next", "--k", 100, "--skip-seen", stdin=lines)
    for line, history in zip(out, HISTORIES, strict=True):
        assert set(json.loads(line)["items"]) == set(range(1, 51)) - set(history)


def test_encode(made, pcl, tmp_path):
    dataset, model, file = Dataset(made.data), store.from_pretrained(made.run), tmp_path / "deep" / "users.parquet"
    argv = ["encode", made.run, "--data", made.data, "--tasks", "click", "spend", "--out", file]
    status, out, err = pcl(*argv)
    assert (status, err) == (0, [])
    assert out[0].startswith(f"{file}: complete; 200 of 200 users done now")
    table = pq.read_table(file)
    assert table.schema.names == ["user_id", "click", "spend"]
    assert table.schema.field("click").type == pa.list_(pa.float32())
    assert table["user_id"].to_pylist() == dataset.user_id.tolist()
    histories = [dataset.items[a:b].tolist() for a, b in zip(dataset.offsets, dataset.offsets[1:])]
    with torch.no_grad():
        want = model.encode(PackedBatch.from_lists(histories, num_items=50, max_len=20), ["click", "spend"])
    for task, vectors in want.items():
        torch.testing.assert_close(torch.tensor(table[task].to_pylist()), vectors)
    assert pcl(*argv)[1] == [f"{file}: complete; 0 of 200 users done now"]


def test_predict_for_a_whole_dataset(made, pcl, tmp_path):
    dataset, file = Dataset(made.data), tmp_path / "best.parquet"
    argv = ["predict", made.run, "--task", "next", "--k", 3, "--skip-seen", "--data", made.data, "--out", file]
    status, out, err = pcl(*argv)
    assert (status, err) == (0, [])
    assert out[0].startswith(f"{file}: complete; 200 of 200 users done now")
    histories = [dataset.items[a:b].tolist() for a, b in zip(dataset.offsets, dataset.offsets[1:])]
    lines = "".join(json.dumps(history) + "\n" for history in histories)
    _, answers, _ = pcl("predict", made.run, "--task", "next", "--k", 3, "--skip-seen", stdin=lines)
    assert pq.read_table(file)["items"].to_pylist() == [json.loads(line)["items"] for line in answers]


def test_encode_under_torchrun(made, pcl, tmp_path, monkeypatch):
    argv = ["encode", made.run, "--data", made.data, "--out"]
    pcl(*argv, tmp_path / "one.parquet")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (
        (1, "process 1 of 2 is done, the last one writes the file; 0 of"),
        (0, "complete; 200"),
    ):
        monkeypatch.setenv("RANK", str(rank))  # all users are one shard
        status, out, err = pcl(*argv, tmp_path / "two.parquet")
        assert (status, err) == (0, [])
        assert said in out[0]
    assert pq.read_table(tmp_path / "two.parquet").equals(pq.read_table(tmp_path / "one.parquet"))
