"""The studies: variants that differ, lines apart from each other's, and a task that nobody has learned."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.continual import records, studies, unseen
from benchmarks.continual.picture import growth, write_growth
from benchmarks.continual.settings import GRID
from benchmarks.continual.trial import Trial, make_learner
from pcl_ext.task import TaskSpec


@pytest.mark.parametrize("study", studies.STUDIES)
def test_a_study_has_variants_that_differ(study, comparison, tiny_budget):
    base = Trial("pcl", str(comparison / "data" / "tiny"), "tiny", 0, 0, tiny_budget)
    variants = list(studies.STUDIES[study](base))
    assert len({variant.trial.key for variant in variants}) == len(variants)
    what = [replace(variant.trial, label=None) for variant in variants]
    assert all(what.count(trial) <= 2 for trial in what)  # a default may be among the values that are tried


def test_readouts_without_an_item_memory_have_a_dropout_of_their_own(comparison, tiny_budget):
    """The package's other one was chosen beside an item memory, which it leaves alone."""
    base = Trial("pcl", str(comparison / "data" / "tiny"), "tiny", 0, 0, tiny_budget)
    variants = {variant.name: variant.trial for variant in studies.readout(base)}
    for name in ("copy-last", "copy-pooled"):
        task = make_learner(variants[name], comparison).start_task("segment")
        assert "item_memory" not in task.memories
        assert task.dropout.p == 0.5
    assert variants["pcl"].chosen == GRID["pcl"][0]


@pytest.mark.slow
@pytest.mark.parametrize("study", studies.STUDIES)
def test_a_study_runs(study, comparison, out, inline, tiny_budget):
    torch.set_num_threads(1)
    base = Trial("pcl", str(comparison / "data" / "tiny"), "tiny", 0, 0, tiny_budget, ("segment", "range", "click"))
    variants = list(studies.STUDIES[study](base))
    studies.run(variants, out, 1)
    lines = records.read_lines(out / "studies.jsonl")
    assert {line["study"] for line in lines} == {study}
    assert {line["task"] for line in lines} >= {"segment", "range", "click"}
    assert all(np.isfinite(line["value"]) for line in lines)


def test_another_study_in_the_same_folder_leaves_the_first_ones_lines(tmp_path, monkeypatch):
    def variant(study, seed):
        return SimpleNamespace(study=study, trial=SimpleNamespace(fold="a", seed=seed))

    def line(study, seed, value):
        return {"study": study, "fold": "a", "seed": seed, "value": value}

    values = {("off", 0): 1, ("off", 1): 2, ("order", 0): 3}
    monkeypatch.setattr(
        records,
        "load_trial",
        lambda out, trial: {"lines": [line(*key, values[key]) for key in asked if key[1] == trial.seed]},
    )
    for asked in ([("off", 0), ("off", 1)], [("order", 0)], [("off", 0)]):
        studies.collect([variant(*key) for key in asked], tmp_path)
        values["off", 0] += 10
    asked = []  # killed before anything was done
    monkeypatch.setattr(records, "load_trial", lambda out, trial: None)
    studies.collect([variant("off", 0), variant("order", 0)], tmp_path)
    found = records.read_lines(tmp_path / "studies.jsonl")
    assert found == [line("off", 1, 2), line("order", 0, 3), line("off", 0, 21)]


def test_the_picture_has_a_panel_a_study_and_the_sizes_in_order(tmp_path):
    value = {"pcl": 0.6, "pcl-10": 0.3, "pcl-3": 0.3, "pcl-eq1": 0.5, "pcl-eq1-3": 0.2}  # pcl-eq1-10: not yet
    lines = [
        {"study": study, "variant": name, "method": "pcl-eq1" if "eq1" in name else "pcl", "task": "segment"}
        | {"fold": "a", "seed": 0, "metric": "accuracy", "value": found}
        for study in ("cold", "off")
        for name, found in value.items()
    ]
    (axes,) = growth(lines).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "10", "all"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 50], [2, 20]])
    assert growth([line for line in lines if line["study"] == "off"]) is None
    records.append(tmp_path / "studies.jsonl", lines)
    assert write_growth(tmp_path).read_bytes() == write_growth(tmp_path).read_bytes()


def test_an_unseen_tasks_prompt_is_made_from_the_closed_ones(learner):
    made = learner("pcl-eq1")
    made.learn("segment")
    made.learn("range")
    rows = [made.model.task(name).memories["tail"].rows for name in ("segment", "range")]
    for part in rows:
        torch.nn.init.normal_(part)
    spec = TaskSpec("new", "binary", made.model.task("range").spec.description)
    assert (unseen.made_prompt(made.model, spec, "none") == 0).all()
    torch.testing.assert_close(unseen.made_prompt(made.model, spec, "mean"), torch.stack(rows).mean(0))
    nearer = unseen.made_prompt(made.model, spec, "attention")
    assert (nearer - rows[1]).norm() < (nearer - rows[0]).norm()


def test_few_labels_learn_the_head_alone(learner):
    made = learner("pcl-eq1")
    made.learn("segment")
    before = made.model.task("segment").memories["tail"].rows.clone()
    value = unseen.learn_unseen(made, "range", "mean", 10)
    assert 0 <= value <= 1
    assert made.model.task_names == ["next", "segment"]
    assert torch.equal(before, made.model.task("segment").memories["tail"].rows)


@pytest.mark.parametrize("way", ["mean", "attention"])
def test_a_held_out_task_starts_at_a_prompt_of_the_others_alone(learner, way, monkeypatch):
    rest, everything, used = learner("pcl-eq1"), learner("pcl-eq1"), []
    rest.learn("segment")
    for name in ("range", "segment"):
        everything.learn(name)
    fit = unseen.Few.fit
    monkeypatch.setattr(unseen.Few, "fit", lambda few, name: used.append(rows_of(few, name)) or fit(few, name))
    want = unseen.learn_unseen(rest, "range", way, 10)
    with unseen.held_out(everything.model, "range"):
        assert unseen.learn_unseen(everything, "range", way, 10) == want
    assert everything.model.task("range").closed
    torch.testing.assert_close(used, [rows_of(rest, "segment")] * 2)  # the one other task


def rows_of(learner, name):
    return learner.model.task(name).memories["tail"].rows.detach().clone()
