"""Lines of another run are refused before anything runs: what stands in one table must be comparable."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.continual import records
from benchmarks.continual.schedule import Comparison
from pcl_ext.model import MemoryConfig


def test_a_trial_made_with_other_settings_is_refused(plan, out, inline):
    plan = replace(plan, methods=("probe",), seeds=1)
    Comparison(plan, out).run(1)
    other = replace(plan, budget=replace(plan.budget, epochs=3))
    with pytest.raises(ValueError, match="was made with budget.epochs = 2, this call has 3"):
        Comparison(other, out).run(1)


def test_a_call_with_other_settings_is_refused_before_anything_runs(plan, out, inline, tmp_path):
    """Of whatever method: all of them stand in one table."""
    Comparison(replace(plan, methods=("probe",), seeds=1), out).run(1)
    other = replace(plan, methods=("pooled-probe",), budget=replace(plan.budget, stop="loss"))
    inline.done.clear()
    with pytest.raises(ValueError, match=r"matrices\.jsonl was made with budget\.stop = 'mixed', this call has 'loss'"):
        Comparison(other, out).run(1)
    elsewhere = replace(other, folds={"other": plan.folds["tiny"]})
    with pytest.raises(ValueError, match=r"matrices\.jsonl was made with budget\.stop = 'mixed', this call has 'loss'"):
        Comparison(elsewhere, out).run(1)
    with pytest.raises(ValueError, match=r"made with tasks = \['segment', 'range'\], this call has \['segment'\]"):
        Comparison(replace(plan, methods=("pooled-probe",), tasks=("segment",)), out).run(1)
    assert inline.done == []


def test_a_task_table_that_was_replaced_is_refused(plan, out, inline, tmp_path):
    shutil.copytree(plan.folds["tiny"], data := tmp_path / "replaced")
    plan = replace(plan, methods=("popularity",), seeds=1, folds={"tiny": str(data)})
    Comparison(plan, out).run(1)
    path = data / "tasks" / "segment.json"
    path.write_text(path.read_text() + "\n")
    header = data / "dataset.json"
    header.write_text(header.read_text().replace('"sha256"', '"was"'))  # another table, on purpose
    with pytest.raises(ValueError, match=r"made with tasks_sha256\.segment = "):
        Comparison(replace(plan, methods=("probe",)), out).run(1)
    (line,) = records.read_lines(out / "matrices.jsonl")
    del line["identity"]["tasks_sha256"]  # as older ones are
    (out / "matrices.jsonl").write_text(json.dumps(line) + "\n")
    Comparison(replace(plan, methods=("probe",)), out).run(1)


@pytest.mark.parametrize("part", ["package", "defaults"])
def test_lines_of_another_package_are_refused(part, plan, out, inline, monkeypatch):
    """Its own defaults decide what a task stores and how it learns; older lines do not say what they were."""
    plan = replace(plan, methods=("popularity",), seeds=1)
    Comparison(plan, out).run(1)
    if part == "package":
        monkeypatch.setattr("benchmarks.continual.trial.__version__", "0.0.1")
    else:
        shorter = partial(MemoryConfig, prompt_len=2)
        monkeypatch.setattr("benchmarks.continual.trial.MemoryConfig", shorter)
    with pytest.raises(ValueError, match=rf"matrices\.jsonl was made with {part}"):
        Comparison(replace(plan, methods=("cheap",)), out).run(1)
    (line,) = records.read_lines(out / "matrices.jsonl")
    del line["identity"][part]
    (out / "matrices.jsonl").write_text(json.dumps(line) + "\n")
    Comparison(replace(plan, methods=("cheap",)), out).run(1)


def test_lines_chosen_among_fewer_points_are_refused(plan, out, inline):
    Comparison(replace(plan, methods=("probe",), seeds=1, points=1), out).run(1)
    inline.done.clear()
    other = replace(plan, methods=("popularity",), seeds=1, points=None)
    with pytest.raises(ValueError, match=r"made with grid points of probe = 1, this call has 2"):
        Comparison(other, out).run(1)
    assert inline.done == []
    (line,) = records.read_lines(out / "matrices.jsonl")
    del line["points"]  # as older ones are
    (out / "matrices.jsonl").write_text(json.dumps(line) + "\n")
    Comparison(other, out).run(1)


def test_results_of_an_unknown_budget_are_refused(plan, out, inline):
    """Without its matrix nothing says with what a line was made; a killed run has its trial still."""
    plan = replace(plan, methods=("popularity",), seeds=1)
    Comparison(plan, out).run(1)
    matrices = (out / "matrices.jsonl").read_text()
    (out / "matrices.jsonl").unlink()
    Comparison(plan, out).run(1)
    assert (out / "matrices.jsonl").read_text() == matrices
    (out / "matrices.jsonl").unlink()
    shutil.rmtree(out / "trials")
    with pytest.raises(ValueError, match=r"lines of popularity/tiny-0 that are not in matrices\.jsonl"):
        Comparison(replace(plan, methods=("cheap",)), out).run(1)
