"""A run there and back, and every way in which a folder can be wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.store import (
    StoreError,
    from_pretrained,
    hash_tensor,
    load_tensors,
    lock,
    read_manifest,
    save_pretrained,
    save_tensors,
    verify,
)
from pcl_ext.store.manifest import backbone_hash, describe
from pcl_ext.store.tensor_file import read_tensors, sign
from pcl_ext.task import TaskSpec

SPECS = {
    "next": TaskSpec("next", "items"),
    "range_b": TaskSpec("range_b", "items", catalogue=(7, 3, 20)),
    "ctr": TaskSpec("ctr", "binary", "will click"),
    "age": TaskSpec("age", "classes", num_classes=3),
    "spend": TaskSpec("spend", "regression"),
}
HISTORIES = [[1, 2, 3], [], [5] * 9, [20]]
RECORD = {"dataset": {"name": "shop"}, "matrix": {"rows": [{"next": {"mrr@5": 0.1}}]}}


def make_model(*tasks, seed=0, placement="both"):
    torch.manual_seed(seed)
    model = UserModel(Backbone(BackboneConfig(20, dim=4, num_layers=1, max_len=6)))
    model.freeze_backbone()
    for name in tasks:
        add(model, name, placement)
    return model.eval()


def add(model, name, placement="both"):
    task = model.add_task(SPECS[name], MemoryConfig(placement=placement, prompt_len=2, item_width=2))
    for parameter in task.parameters():
        parameter.data.normal_()
    model.freeze_task(name)


def hashes(model):
    return {name: hash_tensor(tensor) for name, tensor in model.state_dict().items()}


def files(path):
    return sorted(str(p.relative_to(path)) for p in Path(path).rglob("*") if p.is_file() and "lock" not in p.name)


@pytest.fixture
def run(tmp_path):
    save_pretrained(make_model("next", "ctr"), tmp_path / "run", RECORD)
    return tmp_path / "run"


@pytest.mark.parametrize("placement", ["none", "tail", "prefix", "both"])
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


def test_a_loaded_model_is_frozen_and_draws_no_random_numbers(run):
    state = torch.get_rng_state()
    model = from_pretrained(str(run))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(model.parameters())
    assert not any(part.training for part in model.modules())
    assert all(task.closed for task in model.tasks.values())


def test_open_tasks_are_left_out(tmp_path):
    model = make_model("next")
    model.add_task(SPECS["age"])
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


# Every way in which a folder can be wrong: a change, and what the error must name.


def path_of(run, name):
    manifest = json.loads((run / "manifest.json").read_text())
    entries = {task["name"]: task for task in manifest["tasks"]} | {"backbone": manifest["backbone"]}
    return run / entries[name]["file"]


def flip(run, name):
    file = path_of(run, name)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def edit(change, resign=True):
    """Change the manifest, with its own sha256 made good again: someone meant it."""

    def apply(run):
        manifest = json.loads((run / "manifest.json").read_text())
        del manifest["sha256"]
        change(manifest)
        (run / "manifest.json").write_text(
            json.dumps(sign(manifest, "") if resign else manifest | {"sha256": "0" * 64})
        )

    return apply


def at(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit(change)


def drop(*keys):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit(change)


def rewrite(name, change, listed=False):
    """Change the tensors of a file, its own hashes good; with `listed` the manifest too, as if all was meant."""

    def apply(run):
        content = read_tensors(path_of(run, name))
        tensors, metadata = dict(content.tensors), dict(content.metadata)
        change(tensors, metadata)
        save_tensors(path_of(run, name), tensors, metadata)
        if listed:
            edit(lambda manifest: list_again(run, manifest, name, tensors))(run)

    return apply


def list_again(run, manifest, name, tensors):
    entry = manifest["backbone"] if name == "backbone" else next(t for t in manifest["tasks"] if t["name"] == name)
    content = read_tensors(run / entry["file"])
    file = f"{'' if name == 'backbone' else 'tasks/'}{name}-{content.sha256[:8]}.safetensors"
    os.rename(run / entry["file"], run / file)
    entry |= {"file": file, "bytes": content.size, "sha256": content.sha256, "tensors": describe(tensors)}
    if name == "backbone":
        entry["hash"] = backbone_hash(entry["config"], entry["tensors"])


def with_tensor(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def foreign_backbone(run):
    save_pretrained(make_model("ctr", seed=5), run.parent / "other")
    shutil.copy(path_of(run.parent / "other", "ctr"), path_of(run, "ctr"))


def foreign_task_listed(run):
    save_pretrained(make_model("ctr", seed=5), run.parent / "other")
    entry = read_manifest(run.parent / "other")["tasks"][0]
    shutil.copy(run.parent / "other" / entry["file"], run / entry["file"])
    at("tasks", 1, value=entry)(run)


def swapped_backbone(run):
    save_pretrained(make_model(seed=5), run.parent / "other")
    entry = read_manifest(run.parent / "other")["backbone"]
    shutil.copy(run.parent / "other" / entry["file"], run / entry["file"])
    at("backbone", value=entry)(run)


def text(content):
    return lambda run: (run / "manifest.json").write_bytes(content)


def truncated(name):
    def apply(run):
        data = path_of(run, name).read_bytes()
        path_of(run, name).write_bytes(data[: len(data) // 2])

    return apply


HEAD = "head.linear.weight"
SHAPE = make_model("ctr").task("ctr").head.linear.weight.shape
HOSTILE = {
    "flipped bit, task": (lambda run: flip(run, "ctr"), r"ctr-.{8}\.safetensors tensor '.*' is not what was saved"),
    "flipped bit, backbone": (lambda run: flip(run, "backbone"), r"backbone-.{8}\.safetensors tensor 'trained_items'"),
    "truncated task": (truncated("ctr"), r"tasks/ctr-.{8}\.safetensors .*truncated"),
    "truncated backbone": (truncated("backbone"), r"backbone-.{8}\.safetensors .*truncated"),
    "task file missing": (lambda run: path_of(run, "ctr").unlink(), r"tasks/ctr-.{8}\.safetensors is missing; restore"),
    "backbone missing": (lambda run: path_of(run, "backbone").unlink(), r"backbone-.{8}\.safetensors is missing"),
    "manifest missing": (
        lambda run: (run / "manifest.json").unlink(),
        "manifest.json is missing; name the folder of a run",
    ),
    "file of another backbone": (
        foreign_backbone,
        r"ctr-.{8}\.safetensors was made for another backbone .*learn the task",
    ),
    "task of another backbone": (foreign_task_listed, r"ctr-.{8}\.safetensors was made for another backbone"),
    "backbone of another run": (swapped_backbone, r"next-.{8}\.safetensors was made for another backbone"),
    "task file is another task's": (
        lambda run: shutil.copy(path_of(run, "next"), path_of(run, "ctr")),
        r"ctr-.{8}\.safetensors says name = 'next', the manifest 'ctr'",
    ),
    "task file is a backbone": (
        lambda run: shutil.copy(path_of(run, "backbone"), path_of(run, "ctr")),
        r"ctr-.{8}\.safetensors must hold a task, it holds 'backbone'",
    ),
    "head missing": (rewrite("ctr", without(HEAD)), rf"ctr-.{{8}}\.safetensors lacks tensor '{HEAD}' of the manifest"),
    "tensor too many": (rewrite("ctr", with_tensor("x", torch.ones(1))), r"has tensor 'x', unknown to the manifest"),
    "another dtype": (rewrite("ctr", with_tensor(HEAD, torch.zeros(SHAPE).double())), f"tensor '{HEAD}' has dtype F64"),
    "another shape": (rewrite("ctr", with_tensor(HEAD, torch.zeros(2, 3))), rf"tensor '{HEAD}' has shape \[2, 3\]"),
    "another value": (rewrite("ctr", with_tensor(HEAD, torch.zeros(SHAPE))), f"tensor '{HEAD}' has sha256"),
    "another spec": (
        rewrite("ctr", lambda tensors, metadata: metadata.update(spec={})),
        r"ctr-.{8}\.safetensors says spec = {}",
    ),
    "manifest empty": (text(b""), "manifest.json cannot be read as JSON"),
    "manifest no JSON": (text(b"{'schema': 1}"), "manifest.json cannot be read as JSON"),
    "manifest no UTF-8": (text(b"\xff\xfe{}"), "manifest.json cannot be read as JSON"),
    "manifest a list": (text(b"[]"), "manifest.json is no manifest"),
    "manifest deep": (text(b"[" * 200_000), "manifest.json cannot be read as JSON"),
    "manifest key twice": (text(b'{"schema": 1, "schema": 1}'), "manifest.json cannot be read .*twice"),
    "manifest NaN": (text(b'{"schema": NaN}'), "manifest.json cannot be read .*NaN"),
    "manifest cut": (
        lambda run: (run / "manifest.json").write_bytes((run / "manifest.json").read_bytes()[:-40]),
        "manifest.json cannot be read as JSON",
    ),
    "schema unknown": (at("schema", value=2), "manifest.json has schema 2, this pcl_ext reads 1; use the version"),
    "schema a text": (at("schema", value="1"), "manifest.json has schema '1'"),
    "schema true": (at("schema", value=True), "manifest.json has schema True"),
    "edited": (edit(lambda m: m["record"].update(x=1), resign=False), "manifest.json is damaged or was edited"),
    "record a list": (at("record", value=[]), "record must be a JSON dict"),
    "key missing": (drop("tasks", 0, "tensors"), r"tasks\[0\] must have the keys"),
    "key too many": (at("tasks", 0, "pickle", value="x"), r"tasks\[0\] must have the keys"),
    "tasks no list": (at("tasks", value={}), "tasks must be a JSON list"),
    "task twice": (edit(lambda m: m["tasks"].append(m["tasks"][0])), "got 'next' again"),
    "task name": (at("tasks", 1, "name", value="CTR!"), r"must match \[a-z0-9_-\]"),
    "task name too long": (at("tasks", 1, "name", value="a" * 65), r"must match \[a-z0-9_-\]"),
    "task name no text": (at("tasks", 1, "name", value=3), "name must be a str"),
    "task name of another": (at("tasks", 1, "name", value="ctl"), r"tasks\[1\].file is not a file name"),
    "spec of another": (at("tasks", 1, "spec", "name", value="ctl"), r"tasks\[1\].spec.name must be 'ctr', got 'ctl'"),
    "depends on no name": (at("tasks", 1, "depends_on", value=["../x"]), "must match"),
    "hash of the backbone": (at("backbone", "hash", value="0" * 64), "backbone.hash is not the hash"),
    "bytes": (at("tasks", 1, "bytes", value=-1), r"tasks\[1\].bytes must be a count"),
    "bytes differ": (at("tasks", 1, "bytes", value=1), r"ctr-.{8}\.safetensors differs from what was saved"),
    "sha256 no text": (at("tasks", 1, "sha256", value=None), r"tasks\[1\].sha256"),
    "tensor sha256": (
        at("tasks", 1, "tensors", HEAD, "sha256", value="x"),
        r"tasks\[1\].tensors\['head.linear.weight'\]",
    ),
    "tensor dtype": (at("tasks", 1, "tensors", HEAD, "dtype", value="object"), "must have a known dtype"),
    "tensor shape": (at("tasks", 1, "tensors", HEAD, "shape", value="x"), "must have a known dtype and a shape"),
    "config unknown": (at("tasks", 1, "config", "depth", value=3), r"tasks\[1\].config that cannot be built"),
    "kind unknown": (at("tasks", 1, "spec", "kind", value="text"), r"tasks\[1\].spec that cannot be built|says spec"),
    "head in neither": (rewrite("ctr", without(HEAD), listed=True), rf"ctr-.{{8}}\.safetensors lacks tensor '{HEAD}'"),
    "tensor in both": (
        rewrite("ctr", with_tensor("x", torch.ones(1)), listed=True),
        "has tensor 'x', unknown to the model",
    ),
    "shape in both": (
        rewrite("ctr", with_tensor(HEAD, torch.ones(2, 3)), listed=True),
        rf"tensor '{HEAD}' is \[2, 3\]",
    ),
    "dtype in both": (
        rewrite("ctr", with_tensor(HEAD, torch.ones(SHAPE).half()), listed=True),
        f"tensor '{HEAD}' is .*float16, the model needs",
    ),
    "NaN in both": (
        rewrite("ctr", with_tensor(HEAD, torch.full(SHAPE, torch.nan)), listed=True),
        f"tensor '{HEAD}' holds NaN or infinity",
    ),
}
TRAVERSAL = [
    "../ctr-{}",
    "tasks/../../ctr-{}",
    "/etc/ctr-{}",
    "tasks//ctr-{}",
    "ctr-{}",
    "tasks/ctr-{}/x",
    "tasks/ctr-{}\n",
    "",
]


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_what_is_wrong(run, case):
    change, message = HOSTILE[case]
    change(run)
    before = {name: (run / name).read_bytes() for name in files(run)}
    with pytest.raises(StoreError, match=message) as caught:
        from_pretrained(run)
    assert ";" in str(caught.value)  # what is wrong; how to mend it
    assert {name: (run / name).read_bytes() for name in files(run)} == before


@pytest.mark.parametrize(
    "case", [c for c in HOSTILE if "in both" not in c and "neither" not in c and "built" not in HOSTILE[c][1]]
)
def test_verify_finds_it_without_a_model(run, case):
    change, message = HOSTILE[case]
    change(run)
    with pytest.raises(StoreError, match=message):
        verify(run)


@pytest.mark.parametrize("file", TRAVERSAL)
@pytest.mark.parametrize("entry", [("backbone",), ("tasks", 1)], ids=str)
def test_refuses_file_names_that_lead_elsewhere(run, entry, file):
    sha256 = json.loads((run / "manifest.json").read_text())["tasks"][1]["sha256"]
    at(*entry, "file", value=file.format(sha256[:8] + ".safetensors"))(run)
    with pytest.raises(StoreError, match=r"\.file is not a file name of a run"):
        verify(run)


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

    import pickle

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
    with lock(run), pytest.raises(StoreError, match="is in use by another process"), lock(run):
        pass
    with lock(run):  # and free again; saving is not held up by it
        save_pretrained(from_pretrained(run), run)
