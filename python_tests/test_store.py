"""A run there and back: what is kept, what is left alone, and that a flipped bit anywhere is found."""

import os
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from stores import HISTORIES, RECORD, SPECS, add, files, flip, hashes, make_model, path_of
from torch import nn

from pcl_ext.model import MemoryConfig
from pcl_ext.store import StoreError, from_pretrained, load_tensors, lock, read_manifest, save_pretrained, verify
from pcl_ext.store.tensor_file import read_tensors
from pcl_ext.task import TaskSpec


@pytest.fixture
def run(tmp_path):
    save_pretrained(make_model("next", "ctr"), tmp_path / "run", RECORD)
    return tmp_path / "run"


@pytest.mark.parametrize("placement", ["none", "tail", "prefix", "both", "layers"])
def test_there_and_back(tmp_path, placement):
    model = make_model(*SPECS, placement=placement)
    save_pretrained(model, tmp_path / "run", RECORD)
    loaded = from_pretrained(tmp_path / "run")
    assert hashes(loaded) == hashes(model)
    for name, spec in SPECS.items():
        assert loaded.task(name).spec == spec
        assert loaded.task(name).config == model.task(name).config
        assert loaded.predict(HISTORIES, name) == model.predict(HISTORIES, name)
    assert read_manifest(tmp_path / "run")["record"] == RECORD
    assert [task["name"] for task in read_manifest(tmp_path / "run")["tasks"]] == list(SPECS)


def test_a_task_of_a_run_without_the_setting_reads_what_it_read_before(tmp_path, monkeypatch):
    """Before item memories read whole histories a run did not say what they read."""

    def old_fields(config):
        return {name: value for name, value in asdict(config).items() if name != "whole_history"}

    with monkeypatch.context() as patch:
        patch.setattr("pcl_ext.store.run.asdict", old_fields)
        save_pretrained(make_model("next", "ctr"), tmp_path, RECORD)
    assert "whole_history" not in read_manifest(tmp_path)["tasks"][1]["config"]
    old = from_pretrained(tmp_path)
    long = [1, 2, 3] * 20
    assert old.predict([long], "ctr") == old.predict([long[-old.backbone.config.max_len :]], "ctr")
    assert old.predict([long], "ctr") != make_model("next", "ctr").predict([long], "ctr")
    save_pretrained(old, tmp_path)
    assert not from_pretrained(tmp_path).task("ctr").config.whole_history


def test_a_file_that_another_save_sweeps_while_it_is_read_is_named(run, monkeypatch):
    def read_and_lose(path):
        content = read_tensors(path)
        path.unlink()
        return content

    monkeypatch.setattr("pcl_ext.store.run.read_tensors", read_and_lose)
    with pytest.raises(StoreError, match=r"backbone-.*\.safetensors"):
        from_pretrained(run)


def test_a_loaded_model_is_frozen_and_draws_no_random_numbers(run):
    state = torch.get_rng_state()
    model = from_pretrained(str(run))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(model.parameters())
    assert not any(part.training for part in model.modules())
    assert all(task.closed for task in model.tasks.values())


def test_some_tasks_of_a_run_are_opened_with_those_that_they_read(tmp_path):
    model, alone = make_model("next", "ctr", placement="none"), MemoryConfig(placement="none")
    for name, readout in (("age", ("last", "earlier")), ("spend", None)):
        model.add_task(SPECS[name], replace(alone, readout=readout))
        model.freeze_task(name)
    save_pretrained(model, tmp_path)
    assert model.task("age").depends_on == ["next", "ctr"]
    for names, opened in ((["age"], ["next", "ctr", "age"]), (["spend", "next"], ["next", "spend"]), ([], [])):
        loaded = from_pretrained(tmp_path, names)
        assert loaded.task_names == opened
        for name in names:
            assert loaded.predict(HISTORIES, name) == model.predict(HISTORIES, name)
    with pytest.raises(ValueError, match="task must be one of next, ctr, age, spend, got 'sex'"):
        from_pretrained(tmp_path, ["sex"])
    with pytest.raises(TypeError, match="tasks must be a list of names, got the str 'age'"):
        from_pretrained(tmp_path, "age")
    with pytest.raises(StoreError, match="holds next, ctr, age, which this model does not hold"):
        save_pretrained(from_pretrained(tmp_path, ["spend"]), tmp_path)


def test_open_tasks_are_left_out(tmp_path):
    model = make_model("next")
    model.add_task(SPECS["age"])
    with pytest.warns(UserWarning, match="not saved, as they are open: age; freeze_task closes a task"):
        save_pretrained(model, tmp_path, RECORD)
    assert from_pretrained(tmp_path).task_names == ["next"]


def test_learning_on_writes_one_file_and_leaves_the_others(run):
    before = {name: (run / name).stat() for name in files(run) if name != "manifest.json"}
    model = from_pretrained(run)
    add(model, "age")
    model.task("age").depends_on = ["ctr"]
    save_pretrained(model, run)
    assert len(files(run)) == len(before) + 2
    after = {name: (run / name).stat() for name in before}
    assert all((after[name].st_ino, after[name].st_mtime_ns) == (s.st_ino, s.st_mtime_ns) for name, s in before.items())
    loaded = from_pretrained(run)
    assert hashes(loaded) == hashes(model)
    assert loaded.task("age").depends_on == ["ctr"]
    assert read_manifest(run)["record"] == RECORD  # None keeps it


def test_a_removed_task_goes_with_the_save_after(run):
    model = from_pretrained(run)
    model.remove_task("ctr")
    save_pretrained(model, run)
    assert from_pretrained(run).task_names == ["next"]
    assert len(files(run)) == 4  # a reader of the old manifest may still be at it
    save_pretrained(model, run)
    assert len(files(run)) == 3


def test_verify_counts(run):
    manifest = read_manifest(run)
    got = verify(run)
    assert got["tasks"] == ["next", "ctr"]
    assert got["files"] == 3
    assert got["bytes"] == sum((run / name).stat().st_size for name in files(run) if name != "manifest.json")
    assert got["tensors"] == sum(len(e["tensors"]) for e in [manifest["backbone"], *manifest["tasks"]])


def test_a_backbone_may_change_only_while_nothing_was_learned_on_it(tmp_path):
    save_pretrained(make_model(seed=0), tmp_path, RECORD)
    other = make_model("next", seed=1)
    save_pretrained(other, tmp_path)
    assert hashes(from_pretrained(tmp_path)) == hashes(other)
    with pytest.raises(StoreError, match="holds tasks of another backbone; save to another folder"):
        save_pretrained(make_model("next", seed=2), tmp_path)
    assert hashes(from_pretrained(tmp_path)) == hashes(other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["task", "backbone"])
def test_what_is_not_finite_is_not_saved(run, where, bad):
    before = {name: (run / name).read_bytes() for name in files(run)}
    model = from_pretrained(run)
    (model.task("ctr").head.linear.weight if where == "task" else model.backbone.position)[0, 0] = bad
    tensor = "'head.linear.weight' of task 'ctr'" if where == "task" else "'position' of the backbone"
    with pytest.raises(StoreError, match=f"tensor {tensor} must be finite.*nothing was saved"):
        save_pretrained(model, run)
    assert {name: (run / name).read_bytes() for name in files(run)} == before


@pytest.mark.parametrize("record", [{"loss": float("nan")}, {"path": Path("x")}, {1: 2, "a": 3}])
def test_a_record_that_is_no_json_is_not_saved(run, record):
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="record must be JSON"):
        save_pretrained(from_pretrained(run), run, record)
    assert (run / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("change", ["adapter", "parametrisation", "mask"])
def test_a_backbone_with_more_than_its_weights_is_not_saved(tmp_path, change):
    model = make_model("next")
    layer = model.backbone.layers[0]
    linear = next(name for name, part in layer.named_children() if isinstance(part, nn.Linear))
    if change == "adapter":
        setattr(layer, linear, nn.Sequential(getattr(layer, linear), nn.Linear(4, 4)))
    elif change == "mask":
        layer.register_buffer("mask", torch.ones(3))
    else:
        nn.utils.parametrizations.weight_norm(getattr(layer, linear))
    with pytest.raises(StoreError, match=r"must have the tensors of its configuration.*layers\.0\..*merge"):
        save_pretrained(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_leftovers_go_and_the_files_of_others_stay(run):
    model = from_pretrained(run)
    left = [run / ".pcl-0123456789abcdef.tmp", run / "tasks" / ".pcl-0123456789abcdef.tmp"]
    save_pretrained(make_model("age"), run.parent / "other")
    orphan = run / next(name for name in files(run.parent / "other") if "age" in name)
    shutil.copy(run.parent / "other" / "tasks" / orphan.name, orphan)
    others = [run / "notes.txt", run / "tasks" / "mine-01234567.safetensors", run / "backbone-01234567.safetensors"]
    others += [run / "tasks" / "old.safetensors", run / "checkpoints" / ".pcl-0123456789abcdef.tmp"]
    (run / "checkpoints").mkdir()
    for path in left + others:
        path.write_text("text")
    save_pretrained(model, run)
    assert not any(path.exists() for path in [*left, orphan])
    assert all(path.read_text() == "text" for path in others)
    verify(run)


def test_a_damaged_file_is_not_overwritten(run):
    model = from_pretrained(run)
    file = flip(run, "ctr")
    damage = file.read_bytes()
    with pytest.raises(StoreError, match=f"{file.name} is in the way: it is damaged; move it elsewhere and save again"):
        save_pretrained(model, run)
    assert file.read_bytes() == damage
    file.rename(run / "damaged")
    save_pretrained(model, run)
    assert hashes(from_pretrained(run)) == hashes(model)


def test_refuses_to_save_over_a_manifest_it_cannot_read(run):
    model = from_pretrained(run)
    (run / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="no manifest of a run"):
        save_pretrained(model, run)
    assert (run / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(run, seed):
    want, manifest = hashes(from_pretrained(run)), read_manifest(run)
    g = torch.Generator().manual_seed(seed)
    for name in files(run):
        data = (run / name).read_bytes()
        for place in torch.randint(len(data) * 8, (40,), generator=g).tolist():
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            (run / name).write_bytes(flipped)
            try:
                verify(run)
            except StoreError:
                continue
            assert read_manifest(run) == manifest  # a blank became another blank
            assert hashes(from_pretrained(run)) == want
        (run / name).write_bytes(data)


def test_nothing_is_unpickled(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    verify(run)
    from_pretrained(run)


def test_a_task_file_tells_what_it_is(run):
    _, metadata = load_tensors(path_of(run, "ctr"))
    assert metadata["kind"] == "task"
    assert TaskSpec.from_json(metadata["spec"]) == SPECS["ctr"]
    assert metadata["backbone"] == read_manifest(run)["backbone"]["hash"]


def test_a_run_that_is_held_is_refused(run):
    who = f"run is in use by process {os.getpid()} on .+; wait for it"
    with lock(run), pytest.raises(StoreError, match=who), lock(run):
        pass
    with lock(run):  # and free again; saving is not held up by it
        save_pretrained(from_pretrained(run), run)


def test_a_task_that_was_learned_since_is_not_lost(run):
    older = from_pretrained(run)
    newer = from_pretrained(run)
    add(newer, "age")
    save_pretrained(newer, run)
    before = files(run)
    with pytest.raises(StoreError, match="holds age, which this model does not hold closed"):
        save_pretrained(older, run)
    older.add_task(SPECS["age"])
    lost = pytest.raises(StoreError, match="holds age, which this model does not hold closed")
    with pytest.warns(UserWarning, match="as they are open: age"), lost:
        save_pretrained(older, run)
    older.remove_task("age")  # as learning does that fails
    with pytest.raises(StoreError, match="holds age, which this model does not hold closed"):
        save_pretrained(older, run)
    assert files(run) == before
    newer.remove_task("age")
    save_pretrained(newer, run)
    save_pretrained(older, run)


def test_a_task_learned_anew_loses_what_was_recorded_of_the_old_one(run):
    record = {"outputs": {"next": "a", "ctr": "b"}}
    model = from_pretrained(run)
    save_pretrained(model, run, record)
    save_pretrained(model, run)
    assert read_manifest(run)["record"] == record
    model.remove_task("ctr")
    add(model, "ctr")
    save_pretrained(model, run)
    assert read_manifest(run)["record"] == {"outputs": {"next": "a"}}
