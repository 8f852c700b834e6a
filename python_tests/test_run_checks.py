"""What `run` refuses before its first step: data that leaks, folders of anyone's writing included."""

import json
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import BACKBONE

from pcl_ext import loop, ops, run, store, train
from pcl_ext.data import Dataset, check_task
from pcl_ext.train import LearnConfig, PretrainConfig

ONCE = {"epochs": 1, "batch_tokens": 600}
USERS = 60
FOLDS = (["train"] * 4 + ["valid", "test"]) * 10


@pytest.fixture
def write(tmp_path):
    """A dataset folder as other tools would write it: 60 users, 20 items, a table for each task given by name as
    (json values, targets)."""
    torch.set_num_threads(1)
    histories = [[1 + (user * 7 + step * 3) % 20 for step in range(2 + user % 5)] for user in range(USERS)]

    def call(tasks, histories=histories, folds=FOLDS, **header):
        folder = tmp_path / "own"
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps({"format": 1, "name": "own", "num_items": 20} | header))
        items = pa.array(histories, pa.list_(pa.int32()))
        columns = {"user_id": list(range(USERS)), "items": items, "fold": folds}
        pq.write_table(pa.table(columns), folder / "histories.parquet")
        for name, (spec, target) in tasks.items():
            (folder / "tasks" / f"{name}.json").write_text(json.dumps({"name": name} | spec))
            rows = {"user_id": list(range(USERS)), "target": target, "cut": [len(items) for items in histories]}
            pq.write_table(pa.table(rows), folder / "tasks" / f"{name}.parquet")
        return Dataset(folder)

    call.histories = histories
    return call


@pytest.fixture
def no_step(monkeypatch):
    """Training would fail."""

    def fail(*args):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(train, "fit", fail)


def pretrain(dataset, out):
    return run.pretrain(dataset, out, BACKBONE, PretrainConfig(**ONCE))


def learn(dataset, out, name):
    return run.learn(out, dataset, name, LearnConfig(**ONCE))


def test_a_setting_younger_than_a_run_is_no_difference(write, tmp_path):
    dataset, out = write({}), tmp_path / "run"
    model = pretrain(dataset, out)
    record = store.read_manifest(out)["record"]
    del record["config"]["pretrain"]["valid_examples"]
    store.save_pretrained(model, out, record)
    pretrain(dataset, out)
    record["config"]["pretrain"]["seed"] = 7
    store.save_pretrained(model, out, record)
    with pytest.raises(ValueError, match=r"was made with pretrain\.seed = 7, this call has 0"):
        pretrain(dataset, out)


def test_a_table_that_leaks_is_not_learned(write, tmp_path):
    seen = [items[0] for items in write.histories]
    dataset = write({"leak": ({"kind": "items"}, seen)})
    pretrain(dataset, tmp_path / "run")
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"leak\.parquet: target must not be among the first 2 items"):
        learn(dataset, tmp_path / "run", "leak")
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    write({"leak": ({"kind": "items", "repeats": True}, seen)})
    learn(Dataset(dataset.path), tmp_path / "run", "leak")


@pytest.mark.parametrize(
    ("header", "tasks", "words"),
    [
        ({"distinct": True}, {}, "dataset.json says distinct"),
        ({}, {"next": ({"kind": "items"}, [19] * USERS)}, "tasks/next.json does not say repeats"),
    ],
    ids=["header", "next.json"],
)
def test_histories_that_are_not_distinct_are_not_learned_from(write, tmp_path, no_step, header, tasks, words):
    dataset = write(tasks, [[3, 4, 3], *write.histories[1:]], **header)
    with pytest.raises(ValueError, match=f"{words}, so items must not repeat, got 3 twice in row 0"):
        pretrain(dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_has_passed_is_not_looked_at_again(write, tmp_path, monkeypatch):
    unseen = [next(i for i in range(1, 21) if i not in items) for items in write.histories]
    dataset = write({"new": ({"kind": "items"}, unseen)})
    pretrain(dataset, tmp_path / "run")
    check_task(dataset, "new")
    monkeypatch.setattr(sys.modules["pcl_ext.data.check"], "user_chunks", lambda *args: pytest.fail("read again"))
    check_task(Dataset(dataset.path), "new")
    dataset.check()
    monkeypatch.undo()
    write({"new": ({"kind": "items"}, [write.histories[0][0], *unseen[1:]])})
    with pytest.raises(ValueError, match="target must not be among"):
        check_task(dataset, "new")


def test_a_table_that_was_replaced_is_left_out_of_the_comparison(write, tmp_path, caplog, monkeypatch):
    labels = {name: ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)]) for name in ("a", "b", "c")}
    pretrain(write(labels), tmp_path / "run")
    learn(write(labels), tmp_path / "run", "a")
    learn(write(labels), tmp_path / "run", "b")
    labels["a"] = ({"kind": "binary"}, [user // 6 % 2 for user in range(USERS)])
    dataset, step = write(labels), loop._step
    replaced = f"the tables of a in {dataset.path} are not those that the run learned from"

    def told(*args):
        assert replaced in caplog.text
        return step(*args)

    monkeypatch.setattr(loop, "_step", told)
    record = learn(dataset, tmp_path / "run", "c")
    assert list(record["outputs"]) == ["next", "a", "b", "c"]
    found = run.verify_unchanged(tmp_path / "run", dataset)["tasks"]
    assert found == dict.fromkeys(["next", "b", "c"], "equal") | {"a": "not compared: its table is another now"}


def test_on_another_machine_a_replaced_table_is_still_left_out_of_the_comparison(write, tmp_path, caplog, monkeypatch):
    labels = {name: ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)]) for name in ("a", "b")}
    pretrain(write(labels), tmp_path / "run")
    learn(write(labels), tmp_path / "run", "a")
    learned = labels["a"]
    labels["a"] = ({"kind": "binary"}, [user // 6 % 2 for user in range(USERS)])
    here = run.machine()
    monkeypatch.setattr(run, "machine", lambda: here | {"threads": 99})
    learn(write(labels), tmp_path / "run", "b")
    assert "the tables of a in" in caplog.text
    want = {"next": "equal", "a": "not compared: its table was another when the run came to this machine", "b": "equal"}
    assert run.verify_unchanged(tmp_path / "run", write(labels))["tasks"] == want
    labels["a"] = learned  # what it gave there is not known here
    assert run.verify_unchanged(tmp_path / "run", write(labels))["tasks"] == want


@pytest.mark.parametrize("replaced", ["a", "b"])
def test_a_table_that_is_replaced_while_a_task_is_learned(write, tmp_path, monkeypatch, replaced):
    labels = {name: ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)]) for name in ("a", "b")}
    pretrain(write(labels), tmp_path / "run")
    learn(write(labels), tmp_path / "run", "a")
    dataset, taught = write(labels), run.learn_task

    def nightly(*args):
        curve = taught(*args)
        write(labels | {replaced: ({"kind": "binary"}, [user // 6 % 2 for user in range(USERS)])})
        return curve

    monkeypatch.setattr(run, "learn_task", nightly)
    if replaced == "b":
        with pytest.raises(ValueError, match="the table of b was replaced while it was learned; learn it again"):
            learn(dataset, tmp_path / "run", "b")
        monkeypatch.undo()
    learn(dataset, tmp_path / "run", "b")
    found = run.verify_unchanged(tmp_path / "run", dataset)["tasks"]
    assert found["b"] == "equal"
    assert found["a"] == ("not compared: its table is another now" if replaced == "a" else "equal")


def test_a_table_that_is_put_back_while_a_task_is_learned_is_compared(write, tmp_path, monkeypatch):
    labels = {name: ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)]) for name in ("a", "b")}
    dataset, out, taught = write(labels), tmp_path / "run", run.learn_task
    pretrain(dataset, out)
    record = learn(dataset, out, "a")
    record["outputs"]["a"] = "of another model"
    store.save_pretrained(store.from_pretrained(out), out, record)
    write(labels | {"a": ({"kind": "binary"}, [user // 6 % 2 for user in range(USERS)])})
    monkeypatch.setattr(run, "learn_task", lambda *args: (taught(*args), write(labels))[0])
    with pytest.raises(run.ForgettingError, match="learning 'b' changed the outputs of closed tasks: a"):
        learn(dataset, out, "b")


def test_a_run_goes_on_after_a_task_was_removed(write, tmp_path):
    labels = {name: ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)]) for name in ("a", "b", "c")}
    dataset, out = write(labels), tmp_path / "run"
    pretrain(dataset, out)
    for name in ("a", "b"):
        before = learn(dataset, out, name)
    model = store.from_pretrained(out)
    model.remove_task("a")
    store.save_pretrained(model, out)
    after = store.read_manifest(out)["record"]
    assert '"a"' not in json.dumps(after)
    assert after["matrix"]["tasks"] == ["next", "b"]
    assert after["matrix"]["rows"][1] == {name: before["matrix"]["rows"][2][name] for name in ("next", "b")}
    assert run.verify_unchanged(out, dataset)["tasks"] == dict.fromkeys(["next", "b"], "equal")
    for name in ("c", "a"):
        after = learn(dataset, out, name)
    assert after["matrix"]["tasks"] == ["next", "b", "c", "a"]
    assert run.verify_unchanged(out, dataset)["tasks"] == dict.fromkeys(["next", "b", "c", "a"], "equal")


def test_a_run_goes_on_after_a_task_was_taught_by_hand(write, tmp_path):
    labels = {name: ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)]) for name in ("a", "b")}
    dataset, out = write(labels), tmp_path / "run"
    model = pretrain(dataset, out)
    train.learn_task(model, dataset, "a", LearnConfig(**ONCE))
    store.save_pretrained(model, out)
    assert learn(dataset, out, "b")["matrix"]["tasks"] == ["next", "b"]
    found = run.verify_unchanged(out, dataset)["tasks"]
    assert found == dict.fromkeys(["next", "b"], "equal") | {"a": "not compared: this run did not teach it"}


@pytest.mark.parametrize("missing", ["valid", "test"])
def test_a_fold_without_users_is_known_before_training(write, tmp_path, no_step, missing):
    dataset = write({}, folds=[fold.replace(missing, "train") for fold in FOLDS])
    with pytest.raises(ValueError, match=f"has no {missing} users with a target of task 'next'"):
        pretrain(dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fold", ["valid", "test"])
def test_a_fold_of_one_class_has_no_auc(write, tmp_path, monkeypatch, fold):
    rare = [int(user % 4 == 0 and FOLDS[user] != fold) for user in range(USERS)]
    dataset = write({"rare": ({"kind": "binary"}, rare), "rare2": ({"kind": "binary", "metric": "log_loss"}, rare)})
    pretrain(dataset, tmp_path / "run")
    record = learn(dataset, tmp_path / "run", "rare2")
    valid, test = record["curves"]["rare2"][0]["valid"], record["matrix"]["rows"][1]["rare2"]
    assert "auc" not in {"valid": valid, "test": test}[fold]
    assert {"log_loss", "accuracy"} == set(valid) & set(test)
    assert set(record["references"]["rare2"]["cheap"]["metrics"]) == set(test)
    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=f"'rare' needs {fold} users of both classes, all 10 targets are 0; give"):
        learn(dataset, tmp_path / "run", "rare")


def test_several_labels_of_a_user_are_learned(write, tmp_path):
    dataset = write({"label": ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)])})
    path = dataset.path / "tasks" / "label.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1), table.slice(4, 1)]), path)
    pretrain(dataset, tmp_path / "run")
    assert learn(dataset, tmp_path / "run", "label")["references"]["label"]["cheap"]["metrics"]


def test_a_table_that_the_references_cannot_use_costs_no_training(write, tmp_path, monkeypatch):
    dataset = write({"label": ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)])})
    pretrain(dataset, tmp_path / "run")
    monkeypatch.setattr(run.baselines, "cheap", lambda *args: 1 / 0)
    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(ZeroDivisionError):
        learn(dataset, tmp_path / "run", "label")


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        ({"kind": "binary"}, lambda user: FOLDS[user] != "valid" and user % 4 // 2 or user == 4),
        ({"kind": "binary", "metric": "log_loss"}, lambda user: FOLDS[user] == "train" or user % 2),
        ({"kind": "binary", "metric": "log_loss"}, lambda user: FOLDS[user] != "train" and user % 2),
    ],
    ids=["one valid positive", "train users all 1", "train users all 0"],
)
def test_rare_and_one_sided_labels_are_learned(write, tmp_path, spec, target):
    dataset = write({"label": (spec, [int(target(user)) for user in range(USERS)])})
    pretrain(dataset, tmp_path / "run")
    config = LearnConfig(**(ONCE | {"epochs": 3}))
    run.learn(tmp_path / "run", dataset, "label", config)
    assert run.verify_unchanged(tmp_path / "run", dataset)["tasks"]["label"] == "equal"


@pytest.mark.parametrize("kind", ["regression", "classes"])
def test_one_valid_user_is_enough(write, tmp_path, kind):
    spec = {"kind": kind} | ({"num_classes": 3} if kind == "classes" else {})
    folds = ["train" if fold == "valid" and user != 4 else fold for user, fold in enumerate(FOLDS)]
    target = [float(user % 3) if kind == "regression" else user % 3 for user in range(USERS)]
    dataset = write({"label": (spec, target)}, folds=folds)
    pretrain(dataset, tmp_path / "run")
    assert run.learn(tmp_path / "run", dataset, "label", LearnConfig(**(ONCE | {"epochs": 3})))["curves"]["label"]


def test_a_run_keeps_what_its_items_are_called(write, tmp_path):
    dataset, out = write({"label": ({"kind": "binary"}, [user % 4 // 2 for user in range(USERS)])}), tmp_path / "run"

    def call(names):
        pq.write_table(pa.table({"item_id": range(1, 21), "original_id": names}), dataset.path / "items.parquet")
        return Dataset(dataset.path)

    names = [f"sku-{item}" for item in range(1, 21)]
    pretrain(call(names), out)
    kept = store.read_manifest(out)["record"]["dataset"]["item_ids"]
    assert kept == {"count": 20, "sha256": dataset.item_ids_sha256(20)}
    other = call(names[::-1])  # the same histories, so its sha256 is the same
    for work in (lambda: learn(other, out, "label"), lambda: run.verify_unchanged(out, other)):
        with pytest.raises(ValueError, match=r"own: items 1\.\.20 are not those of .*own, from which .*run was made"):
            work()
    learn(call(names), out, "label")


TRAIN = [user for user in range(USERS) if FOLDS[user] == "train"]


@pytest.mark.parametrize(
    ("spec", "target", "said"),
    [
        (
            {"kind": "classes", "num_classes": 4},
            lambda user: user % 2 if user in TRAIN else user % 4,
            "2 of 4 classes of task 'label' have no train target, so it cannot learn them: 2, 3",
        ),
        (
            {"kind": "classes", "num_classes": 3, "labels": ["a", "b", "c"]},
            lambda user: 2 * (user % 2),
            "1 of 3 classes of task 'label' have no train target, so it cannot learn them: 'b'",
        ),
        (
            {"kind": "classes", "num_classes": 20},
            lambda user: user % 2,
            "18 of 20 classes of task 'label' have no train target, so it cannot learn them: 2, .*, 11, ...$",
        ),
        (
            {"kind": "binary", "labels": ["no", "yes"]},
            lambda user: user % 4 // 2 if user not in TRAIN else 1,
            "all 40 train targets of task 'label' are 'yes', which is all that it can learn",
        ),
        ({"kind": "regression"}, lambda user: 0.5, "all 40 train targets of task 'label' are 0.5, which"),
        ({"kind": "classes", "num_classes": 2}, lambda user: user % 2, None),
    ],
    ids=["classes", "labels", "many classes", "binary", "regression", "none"],
)
def test_train_targets_that_cannot_teach_all_are_told(write, tmp_path, caplog, monkeypatch, spec, target, said):
    def stop(*args):
        raise KeyboardInterrupt

    dataset = write({"label": (spec, [target(user) for user in range(USERS)])})
    pretrain(dataset, tmp_path / "run")
    assert not caplog.records
    monkeypatch.setattr(run, "learn_task", stop)
    with pytest.raises(KeyboardInterrupt):
        learn(dataset, tmp_path / "run", "label")
    (text,) = [record.getMessage() for record in caplog.records] or [None]
    assert text == said or re.fullmatch(f"{dataset.path}: {said}.*", text)


def test_another_build_of_the_kernels_is_another_machine(write, tmp_path, monkeypatch):
    dataset = write({})
    pretrain(dataset, tmp_path / "run")
    monkeypatch.setattr(ops, "native_build", lambda: "another")
    found = run.verify_unchanged(tmp_path / "run", dataset)
    assert "bits can be compared on the machine that made the run only: build was " in found["not_checked"]
