"""A run folder from start to end: pretrain, learn task after task, measure, prove that nothing was forgotten."""

from __future__ import annotations

import json
import logging
import platform
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcl_ext import baselines, infer, ops, store
from pcl_ext.checkpoint import differences
from pcl_ext.data import FOLDS, Dataset, check_task
from pcl_ext.metrics import ResultMatrix
from pcl_ext.model import BackboneConfig, MemoryConfig, UserModel
from pcl_ext.serve.item_ids import check_items, describe_items
from pcl_ext.store.atomic import write_file
from pcl_ext.store.record import Record, read_record
from pcl_ext.task import TaskSpec
from pcl_ext.train import LearnConfig, PretrainConfig, learn_task
from pcl_ext.train import pretrain as pretrain_model

_NEED = {"valid": "stop training at its best epoch", "test": "measure what was learned"}
_LOG = logging.getLogger(__name__)
_MOST_NAMED = 10  # classes in a warning
EQUAL, CHANGED, OTHER_SAMPLE = "equal", "changed", "not compared: it was measured on another sample"

PROTOCOL = {
    "ranking": "full, over the task's catalogue, every target",
    "seen items": "not filtered by the metric; a model may rank them last where a task's targets are new items",
    "ties": "expected rank under random tie-breaking",
    "input": "the newest max_len events of items[:cut]; item memories read them all",
    "forgetting": "first - last: R[j, j] - R[K, j], j earlier than K",
}


class ForgettingError(RuntimeError):
    """Learning a task changed the outputs of a closed one; the run is as it was before."""


def pretrain(
    dataset: Dataset,
    out: str | Path,
    backbone: dict[str, Any] | None = None,
    config: PretrainConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> UserModel:
    """Pretrain a backbone on the dataset's train users into a new run folder; row 1 of the result matrix.

    It trains on `device`, and is measured on the CPU, where the model that is returned lies.
    backbone  fields of BackboneConfig other than num_items. A run that was interrupted goes on where it stopped; one
    that is complete is returned as it is. Raises ValueError where `out` holds a dataset, or a run with other settings,
    where another process is at it, where the dataset breaks a promise (`data.check_task`), or cannot be measured.
    """
    shape = BackboneConfig(dataset.num_items, **(backbone or {}))
    config = config or PretrainConfig()
    settings = json.loads(json.dumps({"backbone": shape.to_json(), "pretrain": asdict(config)}))
    out = Path(out)
    if (out / "dataset.json").exists():
        raise ValueError(f"{out} is the folder of a dataset; choose another one for the run")
    if not (out / "manifest.json").exists():
        _check_before(dataset, "next")
    checkpoint = out / "checkpoints" / "next.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(out):
        if (out / "manifest.json").exists():
            record = read_record(out)
            check_dataset(out, record, dataset)
            _check_settings(out, record.config, settings)
            _remove(checkpoint)  # of a process that was killed after it had saved the run
            return store.from_pretrained(out)
        protocol = PROTOCOL | {"dataset": f"{dataset.name} {dataset.sha256}", "split": "by user, fold test"}
        record = Record(_describe(dataset), protocol, settings, machine(), ResultMatrix().to_json())
        record.references["next"] = _references(dataset, "next", checkpoint)
        model, curve = pretrain_model(dataset, shape, config, checkpoint, device=device)
        _measure(model.cpu(), dataset, record, "next", curve)
        store.save_pretrained(model, out, record.to_json())
        _remove(checkpoint)
    return model


def _check_before(dataset: Dataset, name: str) -> None:
    """ValueError, before the first step, for a task that leaks or cannot be measured on the valid or the test users; a
    logged warning where its train users cannot teach all of it."""
    check_task(dataset, name)
    table = dataset.task(name)
    fold = dataset.fold[table.user]
    for which in _NEED:
        target = table.target[fold == FOLDS.index(which)]
        if not len(target):
            raise ValueError(
                f"{dataset.path} has no {which} users with a target of task {name!r}, which are needed to "
                f"{_NEED[which]}; put some users into that fold"
            )
        if table.spec.metric == "auc" and target.min() == target.max():
            raise ValueError(
                f"{dataset.path}: auc of task {name!r} needs {which} users of both classes, all {len(target)} targets "
                f'are {int(target[0])}; give the task "metric": "log_loss", or put users of both classes into that fold'
            )
    _warn_of_train_targets(dataset, table.spec, table.target[fold == FOLDS.index("train")])


def _warn_of_train_targets(dataset: Dataset, spec: TaskSpec, target: np.ndarray) -> None:
    def called(value) -> str:
        return repr(spec.labels[value]) if spec.labels else str(value)

    if len(target) and target.min() == target.max():
        what = "%s: all %d train targets of task %r are %s, which is all that it can learn"
        _LOG.warning(what, dataset.path, len(target), spec.name, called(target[0].item()))
    elif spec.kind == "classes":
        absent = np.flatnonzero(np.bincount(target, minlength=spec.num_classes) == 0).tolist()
        if absent:
            text = ", ".join(map(called, absent[:_MOST_NAMED])) + (", ..." if len(absent) > _MOST_NAMED else "")
            what = "%s: %d of %d classes of task %r have no train target, so it cannot learn them: %s"
            _LOG.warning(what, dataset.path, len(absent), spec.num_classes, spec.name, text)


def learn(
    run: str | Path,
    dataset: Dataset,
    name: str,
    config: LearnConfig | None = None,
    memory: MemoryConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Teach a run one task more, on `device`; returns its record. The run is saved only when every earlier task still
    gives the same bits on all test users (over a large catalogue on a sample, `infer.evaluate`), which are measured on
    the CPU; ForgettingError otherwise. Tasks whose tables have been replaced since they were learned cannot be
    compared: a logged warning names them before training starts.

    A task that the run knows already is left as it is; an interrupted one goes on where it stopped. Raises ValueError
    where another process is at the run, where the task's table breaks a promise (`data.check_task`), or where its
    metric is not defined on the valid or the test users.
    """
    run = Path(run)
    store.read_manifest(run)  # before a lock is left in a folder that is no run
    with store.lock(run):
        record = read_record(run)
        check_dataset(run, record, dataset)
        model = store.from_pretrained(run)
        checkpoint, table = run / "checkpoints" / f"{name}.safetensors", dataset.task_sha256(name)
        if name not in model.task_names:
            _check_before(dataset, name)
            if (why := _other_machine(record.machine)) is not None:
                _LOG.info("measuring all earlier tasks again before training, as other bits are computed now: %s", why)
                _take_outputs_again(model, dataset, record)
            _check_replaced(model, dataset, record)
            checkpoint.parent.mkdir(exist_ok=True)
            record.references[name] = _references(dataset, name, checkpoint)
            config, memory = config or LearnConfig(), memory or MemoryConfig()
            curve = learn_task(model.to(device), dataset, name, config, memory, checkpoint)
            if dataset.task_sha256(name) != table:
                _remove(checkpoint)
                raise ValueError(
                    f"{dataset.path}: the table of {name} was replaced while it was learned; learn it again"
                )
            settings = json.loads(json.dumps({"memory": asdict(memory), "learn": asdict(config)}))
            record.config.setdefault("tasks", {})[name] = settings
            _measure(model.cpu(), dataset, record, name, curve)
            store.save_pretrained(model, run, record.to_json())
        _remove(checkpoint)
    return record.to_json()


def _check_replaced(model: UserModel, dataset: Dataset, record: Record) -> None:
    """Say which learned tasks cannot be compared after the next one is learned, and measure those now: what cannot be
    read at all is known before training."""
    if replaced := [name for name in record.outputs if why_not_compared(record, dataset, name)]:
        infer.evaluate(model, dataset, replaced)
        _LOG.warning(
            "the tables of %s in %s are not those that the run learned from: the outputs of these tasks are not "
            "compared, and their results from here on are those of the new tables",
            ", ".join(replaced),
            dataset.path,
        )


def why_not_compared(record: Record, dataset: Dataset, name: str) -> str | None:
    """Of a learned task; None where its outputs can be compared, as its table is the one that it was learned from."""
    if record.outputs[name] is None:
        return "its table was another when the run came to this machine"
    if record.dataset["tasks"][name] == dataset.task_sha256(name):
        return None
    return "its table is another now" if name in dataset.task_names else f"{dataset.path} has no table of it"


def _same_tables(record: Record, dataset: Dataset) -> list[str]:
    return [name for name in record.outputs if why_not_compared(record, dataset, name) is None]


def _measure(model: UserModel, dataset: Dataset, record: Record, name: str, curve: list[dict]) -> None:
    """Add a learned task to the record: a row of the matrix, its curve, the hashes of its outputs and of its table."""
    scores = infer.evaluate(model, dataset, [*record.outputs, name])  # a model may know tasks that no run taught it
    same = _same_tables(record, dataset)  # now: one may have been replaced meanwhile
    states = compare_outputs(record, scores)
    if changed := [task for task, state in states.items() if state == CHANGED and task in same]:
        raise ForgettingError(f"learning {name!r} changed the outputs of closed tasks: {', '.join(changed)}")
    record.outputs |= {task: scores[task].outputs for task, state in states.items() if state == OTHER_SAMPLE}
    record.samples = samples_of(scores)
    matrix = ResultMatrix.from_json(record.matrix)
    matrix.add(name, model.task(name).spec.metric)
    matrix.append({task: score.metrics for task, score in scores.items()})
    record.matrix = matrix.to_json()
    record.curves[name] = curve
    record.outputs[name] = scores[name].outputs
    record.standard_error[name] = scores[name].standard_error
    learned_from = record.dataset["tasks"]
    learned_from[name] = dataset.task_sha256(name)
    for task in set(scores) - {name}:
        if learned_from[task] != dataset.task_sha256(task):  # cheap models were measured on another table
            record.standard_error[task] = scores[task].standard_error
            record.references.pop(task, None)


def _references(dataset: Dataset, name: str, checkpoint: Path) -> dict[str, Any]:
    """What trivial and cheap models reach; before training, so that a table they cannot use costs none. They are kept
    beside the checkpoint: a run that goes on reads them, unless its dataset is another by now."""
    kept, facts = _beside(checkpoint), {"dataset": dataset.sha256, "table": dataset.task_sha256(name)}
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # a file that is not ours is written anew
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["of"] == facts:
            return found["references"]
    references = {"trivial": baselines.trivial(dataset, name), "cheap": baselines.cheap(dataset, name)}
    write_file(kept, json.dumps({"of": facts, "references": references}).encode())
    return references


def _beside(checkpoint: Path) -> Path:
    """Where the references of a checkpoint's task are kept until it is learned."""
    return checkpoint.with_suffix(".references.json")


def _remove(checkpoint: Path) -> None:
    for path in (checkpoint, _beside(checkpoint)):
        path.unlink(missing_ok=True)


def _take_outputs_again(model: UserModel, dataset: Dataset, record: Record) -> None:
    """Outputs of closed tasks as this machine computes them, before anything is learned here: other machines round
    otherwise. None for a task whose table is gone by now: nothing can be compared with what it gave."""
    scores = infer.evaluate(model, dataset, _same_tables(record, dataset))
    record.outputs = {name: scores[name].outputs if name in scores else None for name in record.outputs}
    record.samples = samples_of(scores)
    record.machine = machine()


def samples_of(scores: dict[str, infer.Score]) -> dict[str, str]:
    """By task of how many examples, where not all were measured."""
    return {name: score.sample for name, score in scores.items() if score.sample}


def compare_outputs(record: Record, scores: dict[str, infer.Score]) -> dict[str, str]:
    """Of the learned tasks that `scores` measured on the test users: EQUAL where their outputs are, bit for bit, those
    of the moment they were closed, CHANGED, or OTHER_SAMPLE where others of their examples were measured then."""
    states = {}
    for name in record.outputs:
        if name in scores:
            equal = scores[name].outputs == record.outputs[name]
            same = scores[name].sample == record.samples.get(name, "")
            states[name] = OTHER_SAMPLE if not same else EQUAL if equal else CHANGED
    return states


def verify_unchanged(run: str | Path, dataset: Dataset | None = None) -> dict[str, Any]:
    """Prove that a run is whole and has forgotten nothing.

    Checks every tensor against its hash; then, with the dataset (by default the one the run was made from, where it
    still lies), that each task's outputs on the test users have the bits they had when the task was closed.
    -> {"tensors": n, "tasks": {name: "equal", "changed", or why it was not compared}, "samples": {name: of how many
    examples, where not of all}, "not_checked": reason or None}
    StoreError for a run that is damaged, ValueError where `dataset` is not the one that the run was made from.
    """
    answer = {"tensors": store.verify(run)["tensors"], "tasks": {}, "samples": {}, "not_checked": None}
    record = read_record(run)
    path = record.dataset.get("path")
    if dataset is not None:
        check_dataset(run, record, dataset)
    elif path and (Path(path) / "dataset.json").exists():
        dataset = Dataset(path)
    answer["not_checked"] = _why_not_checked(record, dataset)
    if answer["not_checked"] is None:
        model = store.from_pretrained(run)
        scores = infer.evaluate(model, dataset, _same_tables(record, dataset))
        answer["samples"] = samples_of(scores)
        untaught = [name for name in model.task_names if name not in record.outputs]
        answer["tasks"] |= dict.fromkeys(untaught, "not compared: this run did not teach it")
        states = compare_outputs(record, scores)
        for name in record.outputs:
            answer["tasks"][name] = states.get(name) or f"not compared: {why_not_compared(record, dataset, name)}"
    return answer


def _why_not_checked(record: Record, dataset: Dataset | None) -> str | None:
    if not record.dataset:
        return "the run has no record of the dataset it was made from"
    if dataset is None:
        return f"the dataset is no longer at {record.dataset['path']}; name it with --data"
    if dataset.sha256 != record.dataset["sha256"]:
        return f"{dataset.path} is no longer the dataset that the run was made from"
    if (other := _other_machine(record.machine)) is not None:
        return f"bits can be compared on the machine that made the run only: {other}"
    return None


def check_dataset(run: Path, record: Record, dataset: Dataset) -> None:
    """Raise ValueError unless the run was made from this dataset, its items called as they were then; tasks may have
    been added since."""
    then = record.dataset
    if not then:
        raise ValueError(
            f"{run} has no record of the dataset it was made from, as pcl pretrain and pcl_ext.run.pretrain write it"
        )
    if then["sha256"] != dataset.sha256:
        was, given = f"{then['name']} {then['sha256'][:8]}", f"{dataset.name} {dataset.sha256[:8]}"
        raise ValueError(
            f"{run} was made from the dataset {was}, {dataset.path} is {given}; name that dataset, or another run"
        )
    check_items(run, record, dataset)
    if missing := [name for name in record.outputs if name not in dataset.task_names]:
        raise ValueError(f"{dataset.path} has no table of {', '.join(missing)}, which {run} has learned")


def machine() -> dict[str, Any]:
    """What decides the bits of a float32 result."""
    return {
        "processor": platform.machine() + " " + torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": ops.native_status().rpartition(", ")[2],
        "build": ops.native_build(),
    }


def _other_machine(then: dict[str, Any]) -> str | None:
    now = machine()
    differing = [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]]
    return "; ".join(differing) or None


def _describe(dataset: Dataset) -> dict[str, Any]:
    facts = {"name": dataset.name, "sha256": dataset.sha256, "path": str(dataset.path.resolve())}
    return facts | {"users": dataset.users_by_fold, "item_ids": describe_items(dataset), "tasks": {}}


def _check_settings(run: Path, then: dict[str, Any], now: dict[str, dict[str, Any]]) -> None:
    for part, values in now.items():
        before = then.get(part)
        if isinstance(before, dict):
            before = values | before  # a setting that is younger than the run is no difference
        for name, was, given in differences(before, values, part):
            raise ValueError(
                f"{run} was made with {name} = {was!r}, this call has {given!r}; choose another run folder"
            )
