"""A dataset that numbers its items otherwise than the run's is refused: each answer would be about other items."""

import json

import pyarrow.parquet as pq
import pytest
from stores import make_model

from pcl_ext import Predictor, save_pretrained
from pcl_ext.cli import main
from pcl_ext.data import Dataset, DatasetWriter
from pcl_ext.serve import ItemIds
from pcl_ext.serve.encode import EncodeJob, PredictJob
from pcl_ext.serve.item_ids import describe_items

NAMES = [f"sku-{item:02}" for item in range(1, 21)]  # the run knows items 1..20
RENUMBERED = ["early", *NAMES]
KEPT = [*NAMES, "late"]


def write(path, names, original=True):
    with DatasetWriter(path, path.name, len(names)) as writer:
        writer.histories([1, 2, 3], [1, 2, len(names), 3], [0, 2, 3, 4], [0, 1, 2])
        if original:
            writer.items(range(1, len(names) + 1), names)
    return Dataset(path)


@pytest.fixture
def run(tmp_path):
    dataset = write(tmp_path / "shop", NAMES)
    record = {"dataset": {"path": str(dataset.path), "item_ids": describe_items(dataset)}}
    save_pretrained(make_model("next", "ctr"), tmp_path / "run", record)
    return tmp_path / "run"


def encode(run, dataset):
    return EncodeJob(Predictor(run), dataset, run.parent / "out.parquet").run()


def predict(run, dataset):
    return PredictJob(Predictor(run), dataset, run.parent / "out.parquet", "ctr").run()


@pytest.mark.parametrize("work", [encode, predict])
def test_renumbered_items_are_refused(run, tmp_path, work):
    with pytest.raises(
        ValueError, match=r"new: items 1\.\.20 are not those of .*shop, from which .*run was made; prep"
    ):
        work(run, write(tmp_path / "new", RENUMBERED))
    with pytest.raises(ValueError, match=r"\[events\] item_ids, the items.parquet that was there then"):
        work(run, write(tmp_path / "fewer", NAMES[:-1]))
    assert not list(tmp_path.glob("out.parquet*"))


@pytest.mark.parametrize("work", [encode, predict])
def test_newer_items_are_dropped_and_the_name_of_a_dataset_does_not_matter(run, tmp_path, work):
    share = work(run, write(tmp_path / "another", KEPT))
    assert (share.users, share.unknown) == (3, 1)


@pytest.mark.parametrize("record", [{}, {"dataset": {"path": "shop"}}, {"dataset": "shop"}], ids=str)
def test_a_run_of_before_is_taken_as_it_is(run, tmp_path, record):
    save_pretrained(make_model("next", "ctr"), run, record)
    assert encode(run, write(tmp_path / "new", RENUMBERED)).complete


def test_a_dataset_that_does_not_name_its_items_gives_a_warning(run, tmp_path, caplog):
    dataset = write(tmp_path / "new", NAMES, original=False)
    assert encode(run, dataset).complete
    assert f"{dataset.path} has no original ids of its items: they are taken for those of {run}" in caplog.text


def test_names_of_other_items_are_refused(run, tmp_path):
    new, kept = (write(tmp_path / name, names) for name, names in (("new", RENUMBERED), ("kept", KEPT)))
    ids = ItemIds(new.path / "items.parquet")
    ids.check(20)
    with pytest.raises(ValueError, match=r"new/items.parquet: items 1\.\.20 are not those of"):
        PredictJob(Predictor(run), kept, tmp_path / "out.parquet", "next", ids=ids)
    ids = ItemIds(kept.path / "items.parquet")
    assert PredictJob(Predictor(run), kept, tmp_path / "out.parquet", "next", ids=ids).run().complete
    with pytest.raises(ValueError, match=r"must name the items 1\.\.22 of the run's dataset, it names 21"):
        ids.check(22)


CONFIG = """name = "shop"
[events]
file = "{log}"
"""


def test_a_log_that_is_prepared_anew(tmp_path, capsys):
    """One new item, the first in the order of the ids: only a dataset that keeps the numbers of the run's is taken."""

    def prepare(name, log, keys=""):
        (tmp_path / f"{name}.csv").write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i in log))
        (tmp_path / f"{name}.toml").write_text(CONFIG.format(log=f"{name}.csv") + keys)
        assert main(["prepare", "events", "--config", f"{tmp_path / name}.toml", "--out", str(tmp_path / name)]) == 0
        return str(tmp_path / name)

    log = [(f"u{user:02}", f"i{(user * 7 + step) % 10}") for user in range(60) for step in range(4)]
    run = str(tmp_path / "run")
    small = ["--backbone.dim", "8", "--backbone.num_heads", "1", "--pretrain.epochs", "1"]
    assert main(["pretrain", prepare("old", log), "--out", run, *small]) == 0
    newer = [*log, ("u00", "a new one"), ("v", "i3")]
    other, kept = (
        prepare("other", newer),
        prepare("kept", newer, f'item_ids = "{tmp_path / "old" / "items.parquet"}"\n'),
    )
    capsys.readouterr()
    out = ["--out", str(tmp_path / "out.parquet")]
    for command in (["encode", run, *out], ["predict", run, "--task", "next", *out]):
        assert main([*command, "--data", other]) == 2
        assert "other: items 1..10 are not those of" in capsys.readouterr().err
    ids = ["predict", run, "--task", "next", "--k", "3", "--item-ids"]
    assert main([*ids, f"{other}/items.parquet"]) == 2
    assert main([*ids, f"{kept}/items.parquet", *out, "--data", kept]) == 0
    assert "1 unknown item ids were dropped" in capsys.readouterr().err
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["original_id"].to_pylist() == sorted({user for user, _ in newer})
    assert {item for row in table["items"].to_pylist() for item in row} <= {f"i{n}" for n in range(10)}
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())["record"]
    assert record["dataset"]["item_ids"] == describe_items(Dataset(tmp_path / "old"))
