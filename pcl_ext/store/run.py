"""A run on disk: the backbone, one file a task, and the manifest that says what belongs together.

Files are named by their content and never overwritten; replacing the manifest is the one commit point, so a save that
is killed leaves the old state or the new one. Every load checks every hash. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.store.atomic import StoreError, damaged, fsync, hash_file, locked, reading, sweep_temporary, write_file
from pcl_ext.store.manifest import (
    BACKBONE_FILE,
    NAME,
    TASK_FILE,
    backbone_hash,
    describe,
    read_manifest,
    write_manifest,
)
from pcl_ext.store.record import without_tasks
from pcl_ext.store.tensor_file import dtype_name, read_tensors, to_pieces
from pcl_ext.task import TaskSpec, check_task_name


def save_pretrained(model: UserModel, path: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Save the backbone and the closed tasks of a model as the run `path`; open tasks are left out, with a warning.

    record  JSON values kept with them; None keeps the record that is there, but for what it says of tasks that were
            removed from the model, or learned anew
    StoreError, with what was saved before untouched: a tensor that is not finite, or of another floating dtype than
    the backbone's item table, a backbone with adapters or parametrisations, a run of another backbone that has tasks, a
    run with a task that is neither closed in the model nor was removed from it, say one learned since it was loaded, a
    damaged file in the way, a second process saving to the same run. OSError where the disk refuses.
    """
    path = Path(path)
    if still_open := [name for name, task in model.tasks.items() if not task.closed]:
        warnings.warn(f"not saved, as they are open: {', '.join(still_open)}; freeze_task closes a task", stacklevel=2)
    backbone = _backbone_entry(model)
    closed = {name: task for name, task in model.tasks.items() if task.closed}
    tasks = [_task_entry(name, task, backbone["hash"], model.backbone.table.dtype) for name, task in closed.items()]
    (path / "tasks").mkdir(parents=True, exist_ok=True)
    with locked(path / ".save.lock", "being saved to", "try again when it is done"):
        old = read_manifest(path) if (path / NAME).exists() else {"backbone": None, "tasks": [], "record": {}}
        if old["tasks"] and old["backbone"]["hash"] != backbone["hash"]:
            raise StoreError(f"{path} holds tasks of another backbone; save to another folder")
        kept, new = ({entry["name"]: entry for entry in entries} for entries in (old["tasks"], tasks))
        if lost := [name for name in kept if name not in new and name not in model.removed]:
            raise StoreError(
                f"{path} holds {', '.join(lost)}, which this model does not hold closed, and which would be lost; load "
                "the run again, or save to another folder"
            )
        _sweep(path, old)
        if record is None:
            record = without_tasks(old["record"], [name for name in kept if not _same(kept[name], new.get(name))])
        values = {
            "backbone": _place(path, "backbone", backbone, old["backbone"]),
            "tasks": [_place(path, f"tasks/{task['name']}", task, kept.get(task["name"])) for task in tasks],
            "record": dict(record),
        }
        for folder in (path / "tasks", path, path.absolute().parent):
            fsync(folder)
        write_manifest(path, values)
        model.removed.clear()


def from_pretrained(path: str | Path, tasks: Sequence[str] | None = None) -> UserModel:
    """The model of a run, on the CPU and in evaluation mode: backbone and tasks frozen, hashes checked of all it reads.

    tasks  names of those to open (all by default), and with them those whose readouts they read; in the run's order

    It is of the dtype in which it was saved, whatever torch's default. StoreError names the file and the tensor that is
    wrong, ValueError a task that the run does not know. Draws no random numbers.
    """
    path = Path(path)
    manifest = read_manifest(path)
    wanted = None if tasks is None else _with_sources(manifest, tasks)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        model = _read_backbone(path, manifest)
        for place, entry in enumerate(manifest["tasks"]):
            if wanted is not None and entry["name"] not in wanted:
                continue
            where = f"tasks[{place}]"
            spec = _build(path / NAME, f"{where}.spec", TaskSpec.from_json, entry["spec"])
            settings = {"whole_history": False} | entry["config"]  # as it was before there was this setting
            config = _build(path / NAME, f"{where}.config", MemoryConfig, **settings)
            tensors = _read(path, entry, manifest)
            depends_on = entry["depends_on"]
            task = _build(path / NAME, where, model.add_task, spec, config, closed=True, depends_on=depends_on)
            kept = "prefix_keys" in tensors
            if kept:
                task.keep_prefix(model.backbone)  # makes room for them
            _fill(task, tensors, path / entry["file"])
            if not kept:  # saved before tasks kept them, or on a backbone that was not frozen
                task.keep_prefix(model.backbone)
    return model.eval()


def _with_sources(manifest: Mapping[str, Any], tasks: Sequence[str]) -> set[str]:
    """These tasks, and those whose readouts they read."""
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names, got the str {tasks!r}")
    known, found, left = {entry["name"]: entry for entry in manifest["tasks"]}, set(), list(tasks)
    while left:
        name = left.pop()
        if name not in known:
            raise ValueError(f"task must be one of {', '.join(known) or '(no tasks yet)'}, got {name!r}")
        if name not in found:
            found.add(name)
            reads = "earlier" in (known[name]["config"].get("readout") or ())
            left += known[name]["depends_on"] if reads else []
    return found


def _read_backbone(path: Path, manifest: Mapping[str, Any]) -> UserModel:
    """A model without tasks, of the dtype of the stored item table; its tasks will be of that too."""
    entry = manifest["backbone"]
    config = _build(path / NAME, "backbone.config", BackboneConfig, **entry["config"])
    model = UserModel(_build(path / NAME, "backbone.config", Backbone, config))
    tensors = _read(path, entry, manifest)
    if "table" in tensors and tensors["table"].is_floating_point():
        model.to(tensors["table"].dtype)
    _fill(model.backbone, tensors, path / entry["file"])
    model.freeze_backbone()
    return model


def verify(path: str | Path) -> dict[str, Any]:
    """Check every file and tensor of a run against the manifest, one file in memory at a time.

    -> {"backbone": its hash, "tasks": [names], "files", "tensors", "bytes"}; StoreError names the file and the tensor.
    """
    path = Path(path)
    manifest = read_manifest(path)
    entries = [manifest["backbone"], *manifest["tasks"]]
    for entry in entries:
        _read(path, entry, manifest)
    return {
        "backbone": manifest["backbone"]["hash"],
        "tasks": [task["name"] for task in manifest["tasks"]],
        "files": len(entries),
        "tensors": sum(len(entry["tensors"]) for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
    }


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold a run for as long as it takes to load, learn and save: of two at once, one would lose what it learned.

    StoreError, saying who, where another process or thread holds it. Ends with the process, however that ends.
    `save_pretrained` does not ask for it.
    """
    with locked(Path(path) / ".lock", "in use", "wait for it, or choose another run folder"):
        yield


def _backbone_entry(model: UserModel) -> dict[str, Any]:
    state = _checked(model.backbone.state_dict(), "the backbone", model.backbone.table.dtype)
    _check_plain(state, model.backbone.config)
    entry = {"config": _json(model.backbone.config.to_json()), "tensors": describe(state), "state": state}
    entry["hash"] = backbone_hash(entry["config"], entry["tensors"])
    entry["metadata"] = _metadata(entry, entry["hash"])
    return entry


def _task_entry(name: str, task: nn.Module, backbone: str, dtype: torch.dtype) -> dict[str, Any]:
    check_task_name(name)
    state = _checked(task.state_dict(), f"task {name!r}", dtype)
    entry = {"name": name, "spec": _json(task.spec.to_json()), "config": _json(asdict(task.config))}
    entry |= {"depends_on": list(task.depends_on), "tensors": describe(state), "state": state}
    entry["metadata"] = _metadata(entry, backbone)
    return entry


def _metadata(entry: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """What a file says of itself, so that one that belongs elsewhere is known."""
    said = {key: entry[key] for key in ("name", "spec", "config", "depends_on") if key in entry}
    return {"kind": "task" if "name" in entry else "backbone", "backbone": backbone, **said}


def _checked(state: Mapping[str, Any], whose: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state, all of it finite tensors, those of numbers with a fraction of the one dtype a run has."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise StoreError(f"{name!r} of {whose} must be a tensor, got {type(tensor).__name__}; nothing was saved")
        if not _is_finite(tensor):
            raise StoreError(f"tensor {name!r} of {whose} must be finite, it holds NaN or infinity; nothing was saved")
        if tensor.is_floating_point() and tensor.dtype != dtype:
            raise StoreError(
                f"tensor {name!r} of {whose} is {tensor.dtype}, the backbone's item table {dtype}, and a run has one "
                "dtype: call model.float() and save again; nothing was saved"
            )
    return dict(state)


def _check_plain(state: Mapping[str, Any], config: BackboneConfig) -> None:
    """The backbone has the tensors that one of its configuration has, and can be loaded again."""
    with torch.device("meta"):
        plain = Backbone(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    odd = set(shapes.items()) ^ {(name, tuple(tensor.shape)) for name, tensor in plain.items()}
    if names := sorted({name for name, _ in odd}):
        raise StoreError(
            f"the backbone must have the tensors of its configuration, it differs in {', '.join(names[:4])}"
            f"{' and others' if len(names) > 4 else ''}: a run holds no adapters, masks, parametrisations or "
            "wrappers; merge them into the weights, compile layers in place, and save again; nothing was saved"
        )


def _is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity: the extremes tell, and need no second tensor of that size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _same(then: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    """Whether a task of the manifest is what is saved under its name now."""
    return now is not None and all(then[key] == now[key] for key in ("spec", "config", "tensors"))


def _json(values: Any) -> Any:
    """As it will come back from JSON: tuples are lists."""
    return json.loads(json.dumps(values))


def _place(path: Path, stem: str, entry: dict[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write the file of a manifest entry, or keep the one that is there; -> the entry with file, bytes and sha256."""
    state, metadata = entry.pop("state"), entry.pop("metadata")
    if old is not None and all(old[key] == value for key, value in entry.items()):
        if (path / old["file"]).is_file() and hash_file(path / old["file"]) == old["sha256"]:
            return dict(old)
    pieces, digest = to_pieces(state, metadata), hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    sha256, size = digest.hexdigest(), sum(len(piece) for piece in pieces)
    final = path / f"{stem}-{sha256[:8]}.safetensors"
    if not os.path.lexists(final):
        write_file(final, *pieces)
    elif not final.is_file() or hash_file(final) != sha256:
        raise damaged(final, "is in the way: it is damaged", mend="move it elsewhere and save again")
    return entry | {"file": final.relative_to(path).as_posix(), "bytes": size, "sha256": sha256}


def _sweep(path: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what earlier saves left: temporary files, and files that bear their content's name but are not in use."""
    used = {entry["file"] for entry in [manifest["backbone"], *manifest["tasks"]] if entry}
    for folder, pattern in ((path, BACKBONE_FILE), (path / "tasks", TASK_FILE)):
        sweep_temporary(folder)
        for file in folder.iterdir():
            match = pattern.fullmatch(file.name)
            if not match or file.relative_to(path).as_posix() in used or file.is_symlink() or not file.is_file():
                continue
            with suppress(OSError):
                if hash_file(file).startswith(match[match.lastindex]):
                    file.unlink()


def _read(path: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a file, every one as the manifest has it."""
    file = path / entry["file"]
    content = read_tensors(file)
    _check_origin(file, content.metadata, _metadata(entry, manifest["backbone"]["hash"]))
    _same_names(file, content.tensors, entry["tensors"], "the manifest")
    for name, tensor in content.tensors.items():
        got = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "sha256": content.hashes[name]}
        want = entry["tensors"][name]
        for key in ("dtype", "shape", "sha256"):
            if got[key] != want[key]:
                raise damaged(file, f"tensor {name!r} has {key} {got[key]}, the manifest says {want[key]}")
        if not _is_finite(tensor):
            raise damaged(file, f"tensor {name!r} holds NaN or infinity")
    with reading(file):
        size = file.stat().st_size
    if (content.sha256, size) != (entry["sha256"], entry["bytes"]):
        raise damaged(file, "differs from what was saved outside of its tensors: its sha256 is not the manifest's")
    return content.tensors


def _check_origin(file: Path, got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    if got.get("kind") != want["kind"]:
        raise damaged(file, f"must hold a {want['kind']}, it holds {got.get('kind')!r:.40}")
    if got.get("backbone") != want["backbone"] and want["kind"] == "task":
        made, here = str(got.get("backbone"))[:8], want["backbone"][:8]
        mend = "put the task's own file back, or learn the task again on this backbone"
        raise damaged(file, f"was made for another backbone ({made}, this run's is {here})", mend=mend)
    for key in sorted(set(got) | set(want)):
        if got.get(key) != want.get(key):
            raise damaged(file, f"says {key} = {got.get(key)!r:.80}, the manifest {want.get(key)!r:.80}")


def _build(file: Path, where: str, make: Any, *args: Any, **kwargs: Any) -> Any:
    """make(...), with a refusal turned into an error about the manifest."""
    try:
        return make(*args, **kwargs)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        mend = "use the version of pcl_ext that wrote the run, or restore the file from a copy"
        raise damaged(file, f"has a {where} that cannot be built: {error}", mend=mend) from error


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Load a state dict without any conversion: same names, shapes and dtypes."""
    want = module.state_dict()
    _same_names(file, tensors, want, "the model")
    for name, tensor in tensors.items():
        if tensor.shape != want[name].shape or tensor.dtype != want[name].dtype:
            here, there = (f"{list(t.shape)} {t.dtype}" for t in (tensor, want[name]))
            raise damaged(file, f"tensor {name!r} is {here}, the model needs {there}")
    module.load_state_dict(tensors)


def _same_names(file: Path, got: Mapping[str, Any], want: Mapping[str, Any], who: str) -> None:
    if missing := sorted(set(want) - set(got)):
        raise damaged(file, f"lacks tensor {missing[0]!r} of {who}")
    if extra := sorted(set(got) - set(want)):
        raise damaged(file, f"has tensor {extra[0]!r}, unknown to {who}")
