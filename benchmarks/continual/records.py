"""Files of a comparison. Everything is written beside and renamed, so a killed run leaves nothing half written.

backbones/FOLD-SEED-dDIM/      run folders, shared by all methods
trials/METHOD/FOLD-SEED-POINT  .json: what one trial measured; .npz: its test outputs
results.jsonl                  a line per method, task, fold and seed, at the grid point that was chosen
matrices.jsonl                 a line per method, fold and seed: the whole result matrix, and the choice

What is in results.jsonl and matrices.jsonl is final: a comparison goes on from these two files alone.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual.methods import LEARNERS, REFERENCES
from benchmarks.continual.methods.pcl import Pcl
from benchmarks.continual.trial import Trial
from pcl_ext.checkpoint import differences
from pcl_ext.metrics import higher_is_better
from pcl_ext.run import PROTOCOL


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_trial(out: Path, trial: Trial, answer: dict[str, Any], outputs: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name.replace("/", "|"): values for name, values in outputs.items()})
    write(out / "trials" / f"{trial.key}.npz", buffer.getvalue())
    write(out / "trials" / f"{trial.key}.json", json.dumps(answer).encode())


def load_trial(out: Path, trial: Trial) -> dict[str, Any] | None:
    """What a trial measured; None where it is still to be done. ValueError where it was made with other settings."""
    path = out / "trials" / f"{trial.key}.json"
    if not path.exists():
        return None
    answer = json.loads(path.read_text())
    check(path, answer["identity"], trial.identity())
    return answer


def check(path: Path, made: dict[str, Any], asked: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """ValueError where what is written at `path` was made with another identity than is asked for; but: parts that may
    differ."""
    left_out = {*but} | ({"tasks_sha256", "package", "defaults"} - made.keys())  # older lines have none
    asked = json.loads(json.dumps(asked))
    made, asked = ({name: part for name, part in one.items() if name not in left_out} for one in (made, asked))
    for name, then, now in differences(made, asked):
        raise ValueError(
            f"{path} was made with {name} = {then!r}, this call has {now!r}; choose another --out, or remove it"
        )


def has_outputs(out: Path, key: str) -> bool:
    return (out / "trials" / f"{key}.npz").exists()


def load_outputs(out: Path, key: str) -> dict[str, np.ndarray]:
    """{"task/user", "task/value", "task/label"} of a trial's test targets."""
    with np.load(out / "trials" / f"{key}.npz") as file:
        return {name.replace("|", "/"): file[name] for name in file.files}


_LEAST = "not before half of the epochs but for a task that starts at a regression"
CHOICE = "grid point by valid users of the fold, first seed"


def protocol(trial: Trial, identity: dict[str, Any], dataset_name: str, choice: str) -> dict[str, Any]:
    """How a trial was measured, learned and chosen."""
    return {
        "ranking": PROTOCOL["ranking"],
        "seen items": PROTOCOL["seen items"],
        "ties": PROTOCOL["ties"],
        "input": PROTOCOL["input"],
        "users": "test users of the fold, split by user",
        "dataset": f"{dataset_name} {identity['dataset']}",
        "stop": _stop(trial.method, identity["budget"]["stop"]),
        "choice": choice,
        "setting": identity["setting"],
        "order": ["next", *identity["tasks"]],
        "forgetting": "R[j, j] - R[K, j], of errors the other way round; 0 where all tasks are learned at once",
    }


def _stop(method: str, stop: str) -> str:
    if method in REFERENCES:
        return "nothing is trained in epochs"
    if issubclass(LEARNERS[method], Pcl):
        return f"valid users, metric, of labels the loss among epochs whose metrics tie (learn_task), {_LEAST}"
    return f"valid users, {stop}, {_LEAST}"


def lines(trial: Trial, answer: dict[str, Any], dataset_name: str, choice: str = CHOICE) -> list[dict[str, Any]]:
    """A result line for every task of a trial; choice: how its setting was chosen."""
    how, reference = protocol(trial, answer["identity"], dataset_name, choice), answer.get("reference", {})
    last, found = answer["test"][-1]["values"], []
    first = {row["after"]: row["values"] for row in answer["test"]}
    for task, value in last.items():
        before = first[task][task] if task in first else value
        lost = before - value if higher_is_better(answer["metric"][task]) else value - before
        found.append(
            {
                "method": trial.method,
                "task": task,
                "fold": trial.fold,
                "seed": trial.seed,
                "metric": answer["metric"][task],
                "value": value,
                "forgetting": lost,
                "parameters": answer["parameters"][task],
                "seconds": answer["seconds"].get(task, 0.0),
                "protocol": how | ({"reference": reference[task]} if task in reference else {}),
            }
        )
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, new: list[dict[str, Any]]) -> None:
    """Add lines to a file, all or none."""
    old = path.read_bytes() if path.exists() else b""
    write(path, old + "".join(json.dumps(line) + "\n" for line in new).encode())
