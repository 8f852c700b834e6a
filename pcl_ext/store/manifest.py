"""manifest.json of a run: which files it is made of and the sha256 of every tensor. Replacing it is the commit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pcl_ext.store.atomic import damaged, reading, write_file
from pcl_ext.store.tensor_file import DTYPES, canonical, check_signature, dtype_name, hash_tensor, parse, sign
from pcl_ext.task import check_task_name

SCHEMA = 1
NAME = "manifest.json"
BACKBONE_FILE = re.compile(r"backbone-([0-9a-f]{8})\.safetensors")
TASK_FILE = re.compile(r"([a-z0-9_-]{1,64})-([0-9a-f]{8})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The checked manifest of a run; StoreError names the entry that is wrong.

    {"schema", "record",
     "backbone": {"file", "bytes", "sha256", "hash", "config", "tensors": {name: {"dtype", "shape", "sha256"}}},
     "tasks": [{"name", "file", "bytes", "sha256", "spec", "config", "depends_on", "tensors"}, ... in order]}
    """
    file = Path(path) / NAME
    mend = "name the folder of a run, or restore the file from a copy"
    begun = file.parent / "checkpoints"
    if begun.is_dir() and (any(begun.glob("next.*")) or not any(file.parent.glob("backbone-*"))):
        mend = "the run is still in pretraining: repeat pcl pretrain, which goes on where it stopped"
    with reading(file, mend):
        text = file.read_bytes()
    try:
        values = parse(text)
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"cannot be read as JSON ({error!s:.200})") from error
    if not isinstance(values, dict) or "schema" not in values:
        raise damaged(file, "is no manifest of a run: it has no schema")
    if values["schema"] != SCHEMA or type(values["schema"]) is not int:
        got = f"has schema {values['schema']!r:.40}, this pcl_ext reads {SCHEMA}"
        raise damaged(file, got, mend="use the version of pcl_ext that wrote the run")
    try:
        check_signature(values)
        _check(values)
    except (ValueError, TypeError) as error:
        raise damaged(file, f"is damaged or was edited: {error}") from error
    return {key: value for key, value in values.items() if key != "sha256"}


def write_manifest(path: Path, values: Mapping[str, Any]) -> None:
    """Commit: replace the manifest of the run `path`, durably."""
    signed = sign({"schema": SCHEMA, **values}, "record")
    _check(signed)
    write_file(path / NAME, (json.dumps(signed, indent=1) + "\n").encode())


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """{name: {"dtype", "shape", "sha256"}}, what the manifest keeps of each tensor."""
    return {
        name: {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "sha256": hash_tensor(tensor)}
        for name, tensor in tensors.items()
    }


def backbone_hash(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """What tells one backbone from another: its shape and every tensor. `tensors` as `describe` gives them."""
    return hashlib.sha256(canonical({"config": config, "tensors": tensors}).encode()).hexdigest()


def _check(values: dict[str, Any]) -> None:
    """ValueError naming the first entry that is not what the schema says."""
    _keys(values, "manifest", {"schema", "sha256", "backbone", "tasks", "record"})
    _is(values["record"], dict, "record")
    backbone = values["backbone"]
    _keys(backbone, "backbone", {"file", "bytes", "sha256", "hash", "config", "tensors"})
    _check_file(backbone, "backbone", BACKBONE_FILE.fullmatch(str(backbone["file"])))
    if backbone["hash"] != backbone_hash(backbone["config"], backbone["tensors"]):
        raise ValueError("backbone.hash is not the hash of backbone.config and backbone.tensors")
    _is(values["tasks"], list, "tasks")
    names: set[str] = set()
    for place, task in enumerate(values["tasks"]):
        where = f"tasks[{place}]"
        _keys(task, where, {"name", "file", "bytes", "sha256", "spec", "config", "depends_on", "tensors"})
        name = check_task_name(task["name"])
        if name in names:
            raise ValueError(f"{where}.name must be new, got {name!r} again")
        names.add(name)
        folder, _, file = str(task["file"]).partition("/")
        match = TASK_FILE.fullmatch(file) if folder == "tasks" else None
        _check_file(task, where, match if match and match[1] == name else None)
        _is(task["spec"], dict, f"{where}.spec")
        if task["spec"].get("name") != name:
            raise ValueError(f"{where}.spec.name must be {name!r}, got {task['spec'].get('name')!r:.80}")
        _is(task["depends_on"], list, f"{where}.depends_on")
        for other in task["depends_on"]:
            check_task_name(other)


def _check_file(entry: dict[str, Any], where: str, match: re.Match | None) -> None:
    if match is None:
        raise ValueError(f"{where}.file is not a file name of a run, got {entry['file']!r:.120}")
    if type(entry["bytes"]) is not int or entry["bytes"] < 0:
        raise ValueError(f"{where}.bytes must be a count, got {entry['bytes']!r:.40}")
    if not str(entry["sha256"]).startswith(match[match.lastindex]):
        raise ValueError(f"{where}.sha256 must begin as the name of its file does, got {entry['sha256']!r:.80}")
    _check_hash(entry["sha256"], f"{where}.sha256")
    _is(entry["config"], dict, f"{where}.config")
    _is(entry["tensors"], dict, f"{where}.tensors")
    for name, tensor in entry["tensors"].items():
        at = f"{where}.tensors[{name!r}]"
        _keys(tensor, at, {"dtype", "shape", "sha256"})
        shape = tensor["shape"]
        if tensor["dtype"] not in DTYPES or not isinstance(shape, list) or any(type(n) is not int for n in shape):
            raise ValueError(f"{at} must have a known dtype and a shape, got {tensor['dtype']!r:.40} {shape!r:.80}")
        _check_hash(tensor["sha256"], f"{at}.sha256")


def _check_hash(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{where} must be 64 hex digits, got {value!r:.80}")


def _keys(value: Any, where: str, keys: set[str]) -> None:
    _is(value, dict, where)
    if set(value) != keys:
        raise ValueError(f"{where} must have the keys {', '.join(sorted(keys))}, got {', '.join(sorted(value)):.200}")


def _is(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a JSON {kind.__name__}, got {type(value).__name__}")
