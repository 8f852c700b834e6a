"""What each command of `pcl` does with its arguments. Each returns the exit status."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pcl_ext import __version__, infer, ops, run, store
from pcl_ext.data import Dataset, events, ml_1m, online_retail, synthetic
from pcl_ext.export import export as write_export
from pcl_ext.metrics import ResultMatrix
from pcl_ext.model import MemoryConfig
from pcl_ext.report import report as write_report
from pcl_ext.serve import ItemIds, Predictor, as_rows
from pcl_ext.serve.encode import DatasetJob, EncodeJob, PredictJob
from pcl_ext.serve.item_ids import check_items
from pcl_ext.serve.lines import read_lines
from pcl_ext.store.atomic import write_file
from pcl_ext.store.record import Record, read_record
from pcl_ext.train import LearnConfig, PretrainConfig

# small and quick: a demonstration takes about a minute
DEMO_BACKBONE = {"dim": 32, "max_len": 50}
DEMO_PRETRAIN = PretrainConfig(epochs=15, learning_rate=1e-2)
DEMO_LEARN = LearnConfig(epochs=12, patience=4, learning_rate=1e-2, head_rate=5e-3)


def prepare(args) -> int:
    _refuse_idle(args)
    if args.source == "events":
        if args.config is None:
            raise ValueError("events needs --config, a TOML file that describes the log")
        events.prepare(args.config, args.out, rotate=args.rotate)
    elif args.source == "synthetic":
        users = 3000 if args.users is None else args.users
        synthetic.prepare(args.out, num_users=users, seed=args.seed or 0, rotate=args.rotate)
    else:
        if args.folder is None:
            raise ValueError(f"{args.source} needs --from, the folder with its files")
        source = {"online-retail": online_retail, "ml-1m": ml_1m}[args.source]
        source.prepare(args.folder, args.out, rotate=args.rotate)
    _show_dataset(Dataset(args.out))
    return 0


def _refuse_idle(args) -> None:
    """ValueError for an option that would do nothing: who gave it believes that it does."""
    of = {"config": ("events",), "folder": ("online-retail", "ml-1m"), "users": ("synthetic",), "seed": ("synthetic",)}
    for name, sources in of.items():
        if getattr(args, name) is not None and args.source not in sources:
            option = "from" if name == "folder" else name
            raise ValueError(f"--{option} is for {' and '.join(sources)}, not for {args.source}")


def _show_dataset(dataset: Dataset) -> None:
    print(f"{dataset.path}: {dataset.num_users:,} users, {dataset.num_items:,} items")
    for name, facts in dataset.describe()["tasks"].items():
        ranked = f" of {facts['catalogue']:,} items" if "catalogue" in facts else ""
        count = f"{facts['classes']} " if "classes" in facts else ""
        print(f"  {name}: {count}{facts['kind']}{ranked}, {facts['metric']}, {facts['rows']:,} rows")


def pretrain(args) -> int:
    device = _device_here(args.device)
    dataset, backbone = Dataset(args.dataset), vars(args.backbone) | {"max_len": args.max_len}
    if not (args.out / "manifest.json").exists():
        _tell_unread(dataset, args.max_len)
    run.pretrain(dataset, args.out, backbone, args.pretrain, device=device)
    print(_matrix(args.out).to_text())
    return 0


def _device_here(name: str) -> str:
    """The device as it is called here: each process of torchrun on a machine has a GPU of its own. ValueError for one
    that is not there."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {name} cannot be used here: {why}") from error
    return name


def _tell_unread(dataset: Dataset, max_len: int) -> None:
    """Say on stderr how many events lie before the newest `max_len` of their user: of them tasks read what an item
    memory keeps, pretraining reads all."""
    lengths = dataset.offsets[1:] - dataset.offsets[:-1]
    unread = int((lengths - max_len).clip(min=0).sum())
    if unread and max_len > 0:  # a wrong max_len is refused later
        users = f"{int((lengths > max_len).sum()):,} of {len(lengths):,} users have more than {max_len:,} events"
        what = f"{unread:,} of {int(lengths.sum()):,} events are older, and of tasks only item memories read them"
        what += "; --max-len takes more, in more time"
        print(f"pcl pretrain: {users}: {what}", file=sys.stderr)


def learn(args) -> int:
    device = _device_here(args.device)
    dataset = Dataset(args.data)
    memory = MemoryConfig(**vars(args.memory), placement=args.placement, prompt_len=args.prompt_len)
    learn_all(args.run, dataset, args.tasks or dataset.task_names[1:], args.learn, memory, device)
    print(_matrix(args.run).to_text())
    return 0


def learn_all(
    folder: Path,
    dataset: Dataset,
    tasks: list[str],
    config: LearnConfig | None,
    memory: MemoryConfig | None,
    device: str = "cpu",
) -> None:
    unknown = [name for name in tasks if name not in dataset.task_names]
    if unknown:
        there = f"{', '.join(dataset.task_names)}, the tasks of {dataset.path}"
        raise ValueError(f"TASK must be one of {there}, got {', '.join(unknown)}")
    known = {task["name"] for task in store.read_manifest(folder)["tasks"]}
    for name in tasks:
        record = Record.from_json(run.learn(folder, dataset, name, config, memory, device=device))
        if name not in record.outputs:
            print(f"{name}: known to the model, which this run did not teach it: no result", flush=True)
            continue
        matrix = ResultMatrix.from_json(record.matrix)
        what = "learned before, left as it is" if name in known else _unchanged(record, dataset, name)
        print(f"{name}: {matrix.metric[name]} {matrix.value(-1, name):.4f}; {what}", flush=True)


def _unchanged(record: Record, dataset: Dataset, name: str) -> str:
    why = {task: run.why_not_compared(record, dataset, task) for task in record.outputs if task != name}
    rest = "".join(f"; {task} not compared: {text}" for task, text in why.items() if text)
    return f"outputs of {list(why.values()).count(None)} earlier tasks unchanged, bit for bit{rest}"


def evaluate(args) -> int:
    record = read_record(args.run)
    dataset = Dataset(args.data)
    run.check_dataset(args.run, record, dataset)
    if args.json:
        if args.json.is_dir():
            raise ValueError(f"--json must be a file, {args.json} is a folder")
        args.json.parent.mkdir(parents=True, exist_ok=True)
    model = store.from_pretrained(args.run)
    names = [name for name in model.task_names if name in dataset.task_names]
    for name in model.task_names:
        if name not in names:
            print(f"pcl evaluate: {dataset.path} has no table of {name}, which is left out", file=sys.stderr)
    scores = infer.evaluate(model, dataset, names, fold=args.fold)
    result = {
        "tasks": {name: score.metrics for name, score in scores.items()},
        "standard_error": {name: score.standard_error for name, score in scores.items()},
        "matrix": record.matrix,
        "forgetting": ResultMatrix.from_json(record.matrix).forgetting(),
        "protocol": record.protocol | {"dataset": f"{dataset.name} {dataset.sha256}", "split": f"fold {args.fold}"},
    }
    if samples := run.samples_of(scores):
        result["protocol"]["samples"] = samples
    if args.fold == "test":  # where they were measured
        result["references"] = {name: _references(record, dataset, name) for name in scores}
    for name, score in scores.items():
        _print_metrics(name, score.metrics, f"{score.count} targets{', ' + score.sample if score.sample else ''}")
        for reference in result.get("references", {}).get(name, {}).values():
            _print_metrics("", reference["metrics"], reference["name"])
    if args.json:
        _write_json(args.json, result)
    return 0


def _print_metrics(name: str, metrics: dict[str, float], of_what: str) -> None:
    print(f"{name:>16}  {'  '.join(f'{metric} {value:.4f}' for metric, value in metrics.items())}  ({of_what})")


def _references(record: Record, dataset: Dataset, name: str) -> dict[str, dict[str, Any]]:
    """Trivial and cheap, measured when a task was learned; none of a table that is another now."""
    same = record.dataset["tasks"].get(name) == dataset.task_sha256(name)
    return record.references.get(name, {}) if same else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all; but what is no plain file, as /dev/stdout, is written to and stays what it is."""
    data = (json.dumps(values, indent=1) + "\n").encode()
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
    else:
        write_file(path, data)


def predict(args) -> int:
    predictor = Predictor(args.run, args.task, k=args.k, device=_device_here(args.device))
    ids = ItemIds(args.item_ids) if args.item_ids else None
    if ids is not None:
        ids.check(predictor.model.backbone.config.num_items)
        check_items(args.run, read_record(args.run), ids)
    if args.data or args.out:
        if not (args.data and args.out):
            raise ValueError("--data and --out come together: whose predictions, and the Parquet file for them")
        dataset = Dataset(args.data)
        return _work(PredictJob(predictor, dataset, args.out, args.task, args.k, skip_seen=args.skip_seen, ids=ids))
    for asked in read_lines(sys.stdin.buffer, (int,) if ids is None else (int, str)):
        histories = [history if ids is None else ids.known(history) for _, history in asked]
        answer = predictor.predict(histories, args.task, args.k, skip_seen=args.skip_seen)
        if dropped := int(answer["unknown"].sum()):
            print(
                f"pcl predict: {dropped} unknown item ids were dropped from {len(histories)} histories",
                file=sys.stderr,
            )
        for (own, _), row in zip(asked, as_rows(answer), strict=True):
            if ids is not None and "items" in row:
                row["items"] = ids.original(row["items"])
            print(json.dumps(own | row))
        sys.stdout.flush()
    return 0


def encode(args) -> int:
    predictor = Predictor(args.run, encode=args.tasks, device=_device_here(args.device))
    dataset = Dataset(args.data)
    return _work(EncodeJob(predictor, dataset, args.out, args.tasks))


def _work(job: DatasetJob) -> int:
    """RANK and WORLD_SIZE are how torchrun tells its processes who they are."""
    if job.out.suffix in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"--out is written as Parquet: name it so, got {job.out.name}")
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    started = time.monotonic()
    share = job.run(rank, processes)
    speed = f", {share.users / (time.monotonic() - started):,.0f} users/s" if share.users else ""
    what = f"{share.users:,} of {job.dataset.num_users:,} users done now{speed}"
    if share.complete:
        print(f"{job.out}: complete; {what}")
    else:
        print(f"{job.out}: process {rank} of {processes} is done, the last one writes the file; {what}")
    if share.unknown:
        print(f"{job.command}: {share.unknown:,} unknown item ids were dropped", file=sys.stderr)
    return 0


def export(args) -> int:
    model = store.from_pretrained(args.run, [args.task])
    files, left_out = write_export(model, args.task, args.out or args.run / "export", args.formats)
    for name, file in files.items():
        print(f"{name}: {file}")
    for why in left_out.values():
        print(f"pcl export: left out: {why}", file=sys.stderr)
    return 0


def report(args) -> int:
    print(write_report(args.run, args.out))
    return 0


def verify(args) -> int:
    if not (args.run / "manifest.json").exists():
        store.read_manifest(args.run)  # says so
    try:
        found = run.verify_unchanged(args.run, Dataset(args.data) if args.data else None)
    except store.StoreError as error:
        print(f"pcl verify: {error}", file=sys.stderr)
        return 1
    print(f"{args.run}: {found['tensors']} tensors match their hashes")
    for name, state in found["tasks"].items():
        whom = found["samples"].get(name, "all test users")
        print(f"  {name}: outputs on {whom}, bit for bit: {state}")
    if left := [state for state in found["tasks"].values() if state.startswith("not compared")]:
        elsewhere = args.data is None and any("table" in state for state in left)
        hint = "; --data names another folder, with the tables they were learned from" if elsewhere else ""
        print(f"  {len(left)} of {len(found['tasks'])} tasks not compared: nothing is proven of them{hint}")
    if found["not_checked"]:
        print(f"  outputs not compared: {found['not_checked']}")
    return 1 if run.CHANGED in found["tasks"].values() else 0


def info(args) -> int:
    print(f"pcl_ext {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(
        f"processor: {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    print(f"kernels: {ops.native_status()}")
    print(f"CUDA kernels: {ops.native_status('cuda')}")
    return 0


def demo(args) -> int:
    dataset = Dataset(args.data) if args.data else _demo_dataset(args.out / "dataset")
    folder = args.out / "run"
    print(f"users {len(dataset.user_id):,}, items {dataset.num_items:,}, tasks {', '.join(dataset.task_names)}")
    run.pretrain(dataset, folder, DEMO_BACKBONE, DEMO_PRETRAIN)
    learn_all(folder, dataset, dataset.task_names[1:], DEMO_LEARN, None)
    print(_matrix(folder).to_text())
    found = run.verify_unchanged(folder, dataset)
    if changed := [task for task, state in found["tasks"].items() if state == run.CHANGED]:
        print(f"outputs changed: {', '.join(changed)}")
        return 1
    if why := found["not_checked"] or next((state for state in found["tasks"].values() if state != run.EQUAL), None):
        print(f"nothing is proven: {why}; another --out makes the demo anew")
        return 1
    lost, count = _matrix(folder).forgetting()["mean"], len(found["tasks"])
    print(f"forgetting {lost:g} (bitwise: all outputs of {count} tasks compared)")
    _print_sizes(folder)
    print(f"report: {write_report(folder)}")
    return 0


def _demo_dataset(path: Path) -> Dataset:
    if not (path / "dataset.json").exists():
        synthetic.prepare(path, num_users=3000, seed=0)
    return Dataset(path)


def _matrix(folder: Path) -> ResultMatrix:
    return ResultMatrix.from_json(read_record(folder).matrix)


def _print_sizes(folder: Path) -> None:
    model = store.from_pretrained(folder)
    shared = sum(t.numel() for t in model.backbone.state_dict().values())
    print(f"numbers stored: backbone {shared:,}")
    for name, task in model.tasks.items():
        print(f"  {name}: {sum(t.numel() for t in task.state_dict().values()):,}")
