import json
import logging
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed_lists import HISTORIES, histories

from pcl_ext import progress as progress_module
from pcl_ext.data import Dataset, check
from pcl_ext.data import parquet as parquet_module

TOY = {"name": "toy", "kind": "items"}


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.list_(pa.int64()), pa.large_list(pa.uint16())], ids=str)
def test_arrays_equal_what_was_written(write_folder, monkeypatch, batch_rows, kind):
    monkeypatch.setattr(parquet_module, "BATCH_ROWS", batch_rows)
    dataset = Dataset(write_folder(items=pa.array(HISTORIES, kind)))
    assert histories(dataset) == HISTORIES
    assert dataset.user_id.tolist() == [10, 11, 12, 13, 14]
    assert dataset.fold.tolist() == [0, 1, 2, 2, 0]
    assert dataset.times is None
    assert (dataset.items.dtype, dataset.offsets.dtype, dataset.fold.dtype) == (np.int32, np.int64, np.uint8)
    assert dataset.users_by_fold == {"train": 2, "valid": 1, "test": 2}
    check(dataset)


def test_users_in_any_order_are_found(write_folder):
    dataset = Dataset(write_folder(user_id=pa.array([14, -3, 12, 99, 10])))
    assert dataset.rows_of([99, 14, 13, -3, 1000, -1000, 14]).tolist() == [3, 0, -1, 1, -1, -1, 0]
    with pytest.raises(ValueError, match=r"user_ids must be integers \[m\], got <U3 \[1\]; users.parquet says"):
        dataset.rows_of(["ann"])


def test_reading_files_says_how_far_it_is(write_folder, caplog, monkeypatch):
    monkeypatch.setattr(progress_module, "_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "pcl_ext"):
        Dataset(write_folder(task=TOY, rows=GOOD)).task("toy")
    assert caplog.messages == [
        "reading histories.parquet: 5 of 5 users",
        "reading toy.parquet: 2 of 2 rows",
    ]


def test_a_task_may_be_added_without_making_it_another_dataset(write_folder, tmp_path):
    first = Dataset(write_folder())
    shutil.copytree(first.path, tmp_path / "copy")
    assert Dataset(tmp_path / "copy").sha256 == first.sha256
    rows = {"user_id": [10], "target": [7], "cut": [3]}
    richer = Dataset(write_folder(task=TOY, rows=rows))
    assert richer.sha256 == first.sha256
    assert richer.task_sha256("toy") != Dataset(tmp_path / "copy").task_sha256("toy")


def test_a_pickled_dataset_is_opened_again_not_copied(write_folder):
    dataset = Dataset(write_folder(items=pa.array([[1, 2] * 5000] * 5, pa.list_(pa.int32()))))
    dataset.task("next")
    text = pickle.dumps(dataset)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert isinstance(again.items, np.memmap)
    assert again.sha256 == dataset.sha256
    assert np.array_equal(again.items, dataset.items)
    write_folder()
    with pytest.raises(ValueError, match="is no longer the dataset that was pickled"):
        pickle.loads(text)


def test_next_is_derived(toy):
    table = toy.task("next")
    assert table.spec.kind == "items"
    assert table.spec.metric == "mrr@5"
    assert (table.user.tolist(), table.cut.tolist(), table.target.tolist()) == ([0, 1, 3], [2, 1, 5], [2, 4, 5])
    assert toy.task_names == ("next", "more", "value")


def test_next_repeats_unless_the_dataset_says_distinct(write_folder):
    assert Dataset(write_folder()).task("next").spec.repeats
    assert not Dataset(write_folder(header={"distinct": True})).task("next").spec.repeats


def test_examples_group_targets_of_a_cut(toy):
    examples = toy.examples("more", "test")
    assert examples.user.tolist() == [3, 3]
    assert examples.cut.tolist() == [3, 6]
    assert examples.target_offsets.tolist() == [0, 2, 3]
    assert examples.target.tolist() == [6, 6, 6]
    assert len(toy.examples("more", None)) == 3
    assert len(toy.examples("more", "valid")) == 0
    chosen = examples.select(examples.user.new_tensor([1, 0]))
    assert (chosen.cut.tolist(), chosen.target_offsets.tolist()) == ([6, 3], [0, 1, 3])


@pytest.mark.parametrize("max_len", [2, 3, 4, 100])
def test_sequences_cover_each_history(toy, max_len):
    examples = toy.sequences(None, max_len)
    covered = {}
    for user, cut in zip(examples.user.tolist(), examples.cut.tolist(), strict=True):
        assert cut > 1
        covered.setdefault(user, []).extend(range(max(0, cut - max_len), cut))
    for user, history in enumerate(HISTORIES):
        seen = covered.get(user, [])
        assert len(seen) == len(set(seen))
        assert len(history) - len(seen) <= (
            1 if len(history) > 1 else len(history)
        )  # a single first event teaches nothing
    assert len(examples.target) == 0


def test_sequences_of_a_fold_hold_no_other_users(toy):
    assert set(toy.sequences("train", 10).user.tolist()) == {0}
    assert toy.histories("test").cut.tolist() == [0, 6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"items": None}, "missing: items"),
        ({"fold": None}, "missing: fold"),
        ({"user_id": pa.array(list("abcde"))}, "user_id must hold integers, got string"),
        ({"user_id": pa.array([1, 2, None, 4, 5])}, "user_id must be without nulls, got None in row 2"),
        ({"user_id": pa.array([1, 2, 3, 2, 5])}, "user_id must be unique (first in row 1), got 2 in row 3"),
        ({"items": pa.array([[1], [2], [3, 0], [4], [5]])}, "items must be item ids 1..7, got 0 in row 2"),
        ({"items": pa.array([[1], [2], [], [4, 4, 8], [5]])}, "items must be item ids 1..7, got 8 in row 3"),
        ({"items": pa.array([[1], None, [3], [4], [5]])}, "items must be without nulls, got None in row 1"),
        ({"items": pa.array([[1], [2, None], [3], [4], [5]])}, "items must be without nulls, got None in row 1"),
        ({"items": pa.array([1, 2, 3, 4, 5])}, "items must hold lists of integers, got int64"),
        ({"items": pa.array([[1.5]] * 5)}, "items must hold integers, got double"),
        ({"fold": pa.array(["train", "valid", "dev", "test", "test"])}, "got 'dev' in row 2"),
        ({"fold": pa.array([0, 1, 2, 0, 0])}, "fold must hold strings, got int64"),
        ({"times": pa.array([[1, 2, 3], [1], [], [1] * 6, [1]])}, "times must be as long as items, got 1 in row 1"),
    ],
    ids=str,
)
def test_broken_histories_are_named(write_folder, change, words):
    folder = write_folder(**change)
    with pytest.raises(ValueError, match="histories.parquet") as error:
        Dataset(folder)
    assert words in str(error.value)
    assert not [p for p in (folder / ".cache").glob("*") if not p.name.startswith("tmp-")]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"format": 2}, "format must be 1, got 2"),
        ({"name": None}, "name must be a string, got None"),
        ({"num_items": 0}, "num_items must be an integer from 1 up, got 0"),
        ({"num_items": "7"}, "num_items must be an integer from 1 up, got '7'"),
        ({"distinct": 1}, "distinct must be true or false, got 1"),
        ({"sha256": {"histories.parquet": "0" * 64}}, "must have the sha256 that dataset.json gives"),
    ],
    ids=str,
)
def test_broken_header_is_named(write_folder, header, words):
    with pytest.raises(ValueError, match="histories.parquet|dataset.json") as error:
        Dataset(write_folder(header=header))
    assert words in str(error.value)


def test_folders_that_are_no_dataset(tmp_path, write_folder):
    with pytest.raises(FileNotFoundError, match="dataset.json is missing"):
        Dataset(tmp_path)
    folder = write_folder()
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        Dataset(folder)
    folder = write_folder()
    (folder / "histories.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="histories.parquet is missing"):
        Dataset(folder)


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1], ids=str)
def test_truncated_parquet_is_named(write_folder, kept):
    path = write_folder() / "histories.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="histories.parquet is not a readable Parquet file"):
        Dataset(path.parent)


def test_damage_inside_a_parquet_is_noticed_by_its_recorded_hash(toy):
    path = toy.path / "histories.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="sha256"):
        Dataset(toy.path)


GOOD = {"user_id": [10, 13], "target": [7, 6], "cut": [3, 6]}


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ({}, {"user_id": [10, 15]}, "user_id must be a user of histories.parquet, got 15 in row 1"),
        ({}, {"cut": [4, 6]}, "cut must be in 0..the history's length, got 4 in row 0"),
        ({}, {"cut": [-1, 6]}, "got -1 in row 0"),
        ({}, {"cut": [1.0, 6.0]}, "cut must hold integers, got double"),
        ({}, {"target": [8, 6]}, "target must be an item id 1..7, got 8 in row 0"),
        ({}, {"target": [6, 0]}, "target must be an item id 1..7, got 0 in row 1"),
        ({}, {"target": [6, None]}, "target must be without nulls, got None in row 1"),
        ({"catalogue": [5, 6]}, {}, "target must be an item of the task's catalogue, got 7 in row 0"),
        ({"catalogue": [7, 6]}, {"target": [7, -1]}, "target must be an item of the task's catalogue, got -1 in row 1"),
        ({"catalogue": [7, 6]}, {"target": [8, 6]}, "target must be an item of the task's catalogue, got 8 in row 0"),
        ({}, {"target": [1 << 40, 6]}, "target must be an item id 1..7, got 1099511627776 in row 0"),
        ({"catalogue": [6, 8]}, {}, "catalogue must hold ids 1..7, got 8"),
        ({"kind": "binary"}, {"target": [1, 2]}, "target must be in 0..1, got 2 in row 1"),
        ({"kind": "classes", "num_classes": 3}, {"target": [3, 2]}, "target must be in 0..2, got 3 in row 0"),
        ({"kind": "classes"}, {}, "num_classes"),
        (
            {"kind": "regression"},
            {"target": [1.0, float("nan")]},
            "target must be a number of at most 1e+30 in size, got nan in row 1",
        ),
        ({"kind": "regression"}, {"target": [1.0, -2e30]}, "at most 1e+30 in size, got -2.0000000"),
        ({"kind": "rank"}, {}, "kind of task 'toy' must be one of"),
        ({"kind": None}, {}, "kind is missing"),
        ({"colour": 1}, {}, "unknown keys of a task: colour"),
        ({"name": "toy", "labels": ["a"]}, {}, "labels are for classes and binary only, task 'toy' is items"),
        ({"repeats": "false"}, {}, "repeats of task 'toy' must be of type bool, got 'false'"),
        ({"catalogue": "67"}, {}, "catalogue of task 'toy' must be a list of item ids, got '67'"),
        ({}, {"cut": None}, "missing: cut"),
    ],
    ids=str,
)
def test_broken_tables_are_named(write_folder, task, rows, words):
    values = {k: v for k, v in (TOY | task).items() if v is not None}
    folder = write_folder(task=values, rows={k: v for k, v in (GOOD | rows).items() if v is not None})
    with pytest.raises(ValueError, match="toy") as error:
        Dataset(folder).task("toy")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("task", "got"),
    [
        ({"kind": "binary"}, "binary"),
        ({"kind": "items", "catalogue": [1, 2, 3, 4, 5, 6]}, "a catalogue"),
    ],
    ids=str,
)
@pytest.mark.parametrize("derived", [False, True])
def test_next_ranks_all_items(write_folder, task, got, derived):
    folder = write_folder(task={"name": "next"} | task, rows={"user_id": [10, 13], "target": [1, 1], "cut": [3, 6]})
    if derived:
        (folder / "tasks" / "next.parquet").unlink()
    with pytest.raises(ValueError, match=rf"next\.json: next ranks all items: .* left out, got {got}"):
        Dataset(folder).task("next")


def test_table_and_json_belong_together(write_folder):
    folder = write_folder(task=TOY, rows=GOOD)
    (folder / "tasks" / "toy.json").write_text(json.dumps(TOY | {"name": "other"}))
    with pytest.raises(ValueError, match="name must be the file's, 'toy', got 'other'"):
        Dataset(folder).task("toy")
    (folder / "tasks" / "toy.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"toy.json is missing"):
        Dataset(folder).task("toy")


def test_unknown_names(toy):
    with pytest.raises(ValueError, match="task must be one of next, more, value, got 'less'"):
        toy.task("less")
    with pytest.raises(ValueError, match="fold must be one of train, valid, test, got 'dev'"):
        toy.examples("more", "dev")


def test_a_changed_table_is_read_again(write_folder):
    folder = write_folder(task=TOY, rows=GOOD)
    assert Dataset(folder).task("toy").target.tolist() == [7, 6]
    pq.write_table(pa.table(GOOD | {"target": [6, 7]}), folder / "tasks" / "toy.parquet")
    os.utime(folder / "tasks" / "toy.parquet", ns=(1, 1))
    assert Dataset(folder).task("toy").target.tolist() == [6, 7]


def test_a_table_is_cached_for_the_histories_it_was_read_with(write_folder):
    """A dataset that stayed open while its histories were written anew, with users in another order."""
    folder = write_folder(
        task={"name": "vip", "kind": "regression"}, rows={"user_id": [10, 14], "target": [1.0, 5.0], "cut": [0, 0]}
    )
    old = Dataset(folder)
    turned = pq.read_table(folder / "histories.parquet").take([4, 3, 2, 1, 0])
    write_folder(**{name: turned[name] for name in turned.column_names})
    assert {old.user_id[row]: y for row, y in zip(*_column(old, "vip"), strict=True)} == {10: 1.0, 14: 5.0}
    new = Dataset(folder)
    assert {new.user_id[row]: y for row, y in zip(*_column(new, "vip"), strict=True)} == {10: 1.0, 14: 5.0}


def _column(dataset, name):
    table = dataset.task(name)
    return table.user.tolist(), table.target.tolist()


def test_a_table_is_read_again_where_there_are_fewer_items(write_folder):
    rows = {"user_id": [10], "target": [7], "cut": [0]}
    folder = write_folder(task={"name": "t", "kind": "items", "repeats": True}, rows=rows)
    assert Dataset(folder).task("t").target.tolist() == [7]
    write_folder({"num_items": 6}, items=pa.array([[1]] * 5, pa.list_(pa.int32())))
    with pytest.raises(ValueError, match=r"t\.parquet: target must be an item id 1\.\.6, got 7"):
        Dataset(folder).task("t")


def test_tables_are_those_that_are_there_now(write_folder):
    folder = write_folder()
    dataset, rows = Dataset(folder), {"user_id": [10], "target": [1], "cut": [1]}
    with pytest.raises(ValueError, match="task must be one of next, got .late."):
        dataset.task("late")
    for target in (1, 0):
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / "late.json").write_text(json.dumps({"name": "late", "kind": "binary"}))
        pq.write_table(pa.table(rows | {"target": [target]}), folder / "tasks" / "late.parquet")
        os.utime(folder / "tasks" / "late.parquet", ns=(target, target))
        assert dataset.task_names == ("next", "late")
        assert dataset.task("late").target.tolist() == [target]
        assert dataset.task("late") is dataset.task("late")
