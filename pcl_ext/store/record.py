"""A run's record: what its manifest keeps of how the run was made and measured."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pcl_ext.store.manifest import read_manifest


@dataclass
class Record:
    """What `pcl_ext.run` writes, from `references` on by task name. The store keeps any JSON object as a record: a part
    that is missing is empty here."""

    dataset: dict[str, Any] = field(default_factory=dict)  # tasks: sha256 of the table that each was learned from
    protocol: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # backbone, pretrain, tasks: memory and learn of each
    machine: dict[str, Any] = field(default_factory=dict)  # what decides the bits of a result
    matrix: dict[str, Any] = field(default_factory=dict)  # of `ResultMatrix.to_json`
    references: dict[str, dict[str, Any]] = field(default_factory=dict)  # trivial, cheap: name and metrics
    standard_error: dict[str, dict[str, float]] = field(default_factory=dict)  # by metric
    samples: dict[str, str] = field(default_factory=dict)  # of how many examples, where not all were measured
    outputs: dict[str, str | None] = field(default_factory=dict)  # sha256 at closing; None: nothing compares with it
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # an entry an epoch
    more: dict[str, Any] = field(default_factory=dict)  # other entries, kept as they are

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        parts = {f.name: values[f.name] for f in fields(cls) if f.name != "more" and f.name in values}
        return cls(**parts, more={key: value for key, value in values.items() if key not in parts})

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "more"} | self.more


def read_record(path: str | Path) -> Record:
    """Of a run; StoreError as `read_manifest`."""
    return Record.from_json(read_manifest(path)["record"])


def without_tasks(record: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """The record of a run that never learned the tasks `gone`: their row and column of the result matrix, their
    outputs, curves, references and settings are left out. What is not of that form stays as it is."""
    record = copy.deepcopy(dict(record))
    if not gone:
        return record
    parts = [record.get(key) for key in ("references", "standard_error", "samples", "outputs", "curves")]
    parts += [whole.get("tasks") for key in ("dataset", "config") if isinstance(whole := record.get(key), dict)]
    for part in parts:
        if isinstance(part, dict):
            for name in gone:
                part.pop(name, None)
    matrix = record.get("matrix")
    if isinstance(matrix, dict) and {"tasks", "metric", "rows"} <= set(matrix):
        rows = zip(matrix["tasks"], matrix["rows"], strict=False)
        matrix["rows"] = [_without(row, gone) for name, row in rows if name not in gone]
        matrix["metric"] = _without(matrix["metric"], gone)
        matrix["tasks"] = [name for name in matrix["tasks"] if name not in gone]
    return record


def _without(values: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in gone}
