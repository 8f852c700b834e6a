"""Every way in which a run folder can be wrong is refused, by an error that names the file and the tensor."""

import json
import os
import shutil

import pytest
import torch
from stores import RECORD, files, flip, make_model, path_of

from pcl_ext.store import StoreError, from_pretrained, read_manifest, save_pretrained, save_tensors, verify
from pcl_ext.store.manifest import backbone_hash, describe
from pcl_ext.store.tensor_file import read_tensors, sign


@pytest.fixture
def run(tmp_path):
    save_pretrained(make_model("next", "ctr"), tmp_path / "run", RECORD)
    return tmp_path / "run"


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
    entry |= {
        "file": file,
        "bytes": (run / file).stat().st_size,
        "sha256": content.sha256,
        "tensors": describe(tensors),
    }
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
