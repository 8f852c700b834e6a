"""The harness: one line a result, resumable, chosen on valid users; the page; the studies."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import benchmarks.continual
import pcl_ext
from benchmarks.continual import records, schedule, studies
from benchmarks.continual.__main__ import folds_of, main
from benchmarks.continual.intervals import weighted
from benchmarks.continual.learner import batches_of
from benchmarks.continual.methods import CONTINUAL, LEARNERS, MULTI_TASK, NAMES
from benchmarks.continual.page import write_page
from benchmarks.continual.picture import overview, write_picture
from benchmarks.continual.schedule import Comparison
from benchmarks.continual.settings import GRID, QUICK, READOUTS, Budget, Setting
from benchmarks.continual.summary import summarise
from benchmarks.continual.table import write_table
from benchmarks.continual.trial import Trial, conduct
from pcl_ext import store
from pcl_ext.data import iterate

REQUIRED = {"method", "task", "fold", "seed", "metric", "value", "forgetting", "parameters", "seconds", "protocol"}
PUBLISHED_NAMES = (
    "popularity probe pooled-probe single copy fine mtl mmoe ewc lwf hat piggyback peterrec conure teracon l2p "
    "dualprompt coda pcl-eq1 pcl"
).split()


def test_every_method_has_its_name_and_a_small_grid():
    assert set(PUBLISHED_NAMES) <= set(NAMES)
    assert set(NAMES) == set(GRID)
    assert set(CONTINUAL) | set(MULTI_TASK) <= set(LEARNERS)
    assert GRID["pcl"][0] == Setting()  # what a user gets
    assert max(map(len, GRID.values())) <= 4
    assert all(setting.readout in READOUTS for grid in GRID.values() for setting in grid)


def test_one_line_a_result_and_a_run_that_is_complete_does_nothing(plan, out, inline):
    Comparison(plan, out).run(1)
    lines = records.read_lines(out / "results.jsonl")
    assert all(line.keys() == REQUIRED for line in lines)
    found = {(line["method"], line["task"], line["fold"], line["seed"]) for line in lines}
    assert found == {(m, t, "tiny", s) for m in plan.methods for t in ("next", "segment", "range") for s in range(2)}
    assert len(found) == len(lines)
    assert all(line["forgetting"] == 0 for line in lines if line["method"] == "pcl")
    matrices = records.read_lines(out / "matrices.jsonl")
    assert [len(row["values"]) for m in matrices if m["method"] == "fine" for row in m["test"]] == [1, 2, 3] * 2
    for line in lines:
        own = next(m for m in matrices if (m["method"], m["seed"]) == (line["method"], line["seed"]))
        assert own["test"][-1]["values"][line["task"]] == line["value"]
    Comparison(plan, out).run(1)
    assert inline.done == []
    assert records.read_lines(out / "results.jsonl") == lines
    page = write_page(out).read_text()
    assert all(f"<td>{name}</td>" in page for name in plan.methods)
    assert "best multi-task baseline: mtl" in page
    assert page.index("<h2>At a glance") < page.index("<img") < page.index("<h2>Results")
    tables = write_table(out).read_text()
    assert "| pcl over | next | segment | range | mean |" in tables
    assert [tables.count(f"| {name} |") for name in plan.methods] == [2, 2, 2, 2, 1]
    assert "The best of all for each task, picked by the test users: +" in tables
    picture = write_picture(out).read_bytes()
    assert picture.startswith(b"<?xml")
    assert picture == write_picture(out).read_bytes()
    left, right = overview(summarise(out)).axes
    assert {label.get_text() for label in left.get_yticklabels()} == set(plan.methods) - {"pcl"}
    gains = [text.get_text() for text in left.texts]
    assert gains == sorted(gains, key=lambda text: float(text.removesuffix(" %")))
    assert all(f" | {gain}" in tables for gain in gains)
    assert len(right.patches) == len(gains)


def test_from_the_root_the_installed_package_runs():
    code = "import benchmarks.continual, pcl_ext; print(pcl_ext.__file__)"
    root = Path(benchmarks.continual.__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path(pcl_ext.__file__)


def test_a_killed_run_goes_on(plan, out, inline, monkeypatch):
    plan = replace(plan, methods=("probe",))
    save, saved = records.save_trial, []

    def killed(*arguments):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    monkeypatch.setattr(records, "save_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        Comparison(plan, out).run(1)
    monkeypatch.setattr(records, "save_trial", save)
    Comparison(plan, out).run(1)
    assert [kind for kind, *_ in inline.done].count("trial") == 1
    assert len(records.read_lines(out / "results.jsonl")) == 2 * 3


def test_a_fold_begins_when_a_process_has_nothing_to_do(plan, out, inline, monkeypatch):
    (backbone,) = (out / "backbones").glob("tiny-0-*")
    shutil.copytree(backbone, backbone.with_name(backbone.name.replace("tiny", "other")))
    folds = {name: plan.folds["tiny"] for name in ("tiny", "other")}
    plan, waiting = replace(plan, folds=folds, methods=("popularity",), seeds=1, points=1), []

    def first(futures, **_):
        waiting.append(len(futures))
        return SimpleNamespace(done=[next(iter(futures))])

    monkeypatch.setattr(schedule, "wait", first)
    Comparison(plan, out).run(2)
    assert waiting == [2, 1]


def test_the_grid_point_is_chosen_on_valid_users(plan, out, inline):
    plan = replace(plan, methods=("probe",), seeds=1)
    Comparison(plan, out).run(1)
    trials = [plan.trial("probe", "tiny", 0, point) for point in plan.grid("probe")]
    answers = [records.load_trial(out, trial) for trial in trials]
    best = max(range(2), key=lambda point: answers[point]["valid_score"])
    (matrix,) = records.read_lines(out / "matrices.jsonl")
    assert matrix["point"] == best
    answers[1 - best]["valid_score"] = 99.0
    records.save_trial(out, trials[1 - best], answers[1 - best], {})
    assert Comparison(plan, out).choice("probe", "tiny") == best, "what is written is final"
    (out / "matrices.jsonl").unlink()
    assert Comparison(plan, out).choice("probe", "tiny") == 1 - best


def test_a_comparison_goes_on_from_its_lines_alone(plan, out, inline, tmp_path):
    plan = replace(plan, methods=("probe", "pcl"))
    Comparison(replace(plan, seeds=1), out).run(1)
    (later := tmp_path / "later").mkdir()
    for name in ("results.jsonl", "matrices.jsonl"):
        (later / name).write_bytes((out / name).read_bytes())
    shutil.copytree(out / "backbones", later / "backbones")
    inline.done.clear()
    Comparison(plan, later).run(1)
    points = {line["method"]: line["point"] for line in records.read_lines(out / "matrices.jsonl")}
    trials = [(t.method, t.seed, t.point) for kind, t, *_ in inline.done if kind == "trial"]
    assert trials == [(name, 1, points[name]) for name in plan.methods]
    assert {(line["method"], line["seed"]) for line in records.read_lines(later / "results.jsonl")} == {
        (name, seed) for name in plan.methods for seed in range(2)
    }
    assert "best multi-task" not in write_page(later).read_text()
    other = replace(plan, budget=replace(plan.budget, epochs=3))
    with pytest.raises(ValueError, match=r"matrices\.jsonl was made with budget\.epochs = 2, this call has 3"):
        Comparison(other, later).run(1)


def test_a_grid_point_that_diverges_leaves_the_choice_to_the_others(plan, out, inline, monkeypatch):
    plan, learn = replace(plan, methods=("fine",), seeds=1), LEARNERS["fine"].learn
    fast = max(setting.rate for setting in GRID["fine"])

    def learn_or_diverge(self, name):
        if self.world.setting.rate in bad:
            raise FloatingPointError("the loss is nan")
        learn(self, name)

    monkeypatch.setattr(LEARNERS["fine"], "learn", learn_or_diverge)
    bad = {fast}
    Comparison(plan, out).run(1)
    (matrix,) = records.read_lines(out / "matrices.jsonl")
    assert matrix["identity"]["setting"]["rate"] < fast
    bad = {setting.rate for setting in GRID["fine"]}
    for path in [*out.glob("*.jsonl"), *out.glob("trials/fine/*")]:
        path.unlink()
    with pytest.raises(RuntimeError, match="training diverged, so there is no result of fine/tiny-0"):
        Comparison(plan, out).run(1)
    assert records.read_lines(out / "results.jsonl") == []


@pytest.mark.parametrize(("run", "words"), [(main, ["--methods", "popularity"]), (studies.main, ["off"])])
def test_two_commands_do_not_write_into_one_folder(run, words, comparison, tmp_path):
    with store.lock(tmp_path), pytest.raises(store.StoreError, match="is in use by"):
        run([*words, "--data", str(comparison / "data"), "--out", str(tmp_path)])


@pytest.mark.parametrize("option", ["--seeds", "--points", "--jobs"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5"])
def test_a_number_of_the_command_line_is_at_least_one(option, number, capsys):
    with pytest.raises(SystemExit):
        main(["--data", "a", "--out", "b", option, number])
    assert f"must be a whole number from 1 up, got '{number}'" in capsys.readouterr().err


def test_a_protocol_says_how_each_method_stops_and_was_chosen(plan, out, inline):
    plan = replace(plan, methods=("cheap", "probe", "pcl"), seeds=1, points=1)
    plan = replace(plan, budget=replace(plan.budget, stop="loss"))
    Comparison(plan, out).run(1)
    lines = records.read_lines(out / "results.jsonl")
    stop = {line["method"]: line["protocol"]["stop"] for line in lines}
    assert stop["probe"].startswith("valid users, loss, not before half of the epochs but for a task that starts at")
    assert "learn_task" in stop["pcl"]
    assert "nothing is trained" in stop["cheap"]
    reference = {line["task"]: line["protocol"].get("reference") for line in lines if line["method"] == "cheap"}
    assert reference["next"].startswith("Markov chain")
    assert all(reference.values())


def test_lines_of_a_method_that_is_no_more_stay(plan, out, inline):
    plan = replace(plan, methods=("popularity",), seeds=1)
    Comparison(plan, out).run(1)
    for name in ("results.jsonl", "matrices.jsonl"):
        (out / name).write_text((out / name).read_text().replace('"popularity"', '"fashion"'))
    Comparison(plan, out).run(1)
    assert {line["method"] for line in records.read_lines(out / "results.jsonl")} == {"fashion", "popularity"}


def test_results_without_their_matrices_have_a_page(plan, out, inline):
    Comparison(replace(plan, methods=("popularity", "probe", "pcl"), seeds=1), out).run(1)
    lines = records.read_lines(out / "matrices.jsonl")
    kept = [json.dumps(line) for line in lines if line["method"] != "probe"]
    (out / "matrices.jsonl").write_text("\n".join(kept) + "\n")
    assert "<td>probe</td>" in write_page(out).read_text()
    assert "| probe |" in write_table(out).read_text()


def test_references_need_no_backbone(plan, tmp_path, inline):
    Comparison(replace(plan, methods=("popularity",)), tmp_path).run(1)
    assert [kind for kind, *_ in inline.done].count("pretrain") == 0


def test_a_dataset_with_nothing_after_pretraining_is_refused(comparison, tmp_path):
    shutil.copytree(comparison / "data" / "tiny", data := tmp_path / "bare")
    for path in (data / "tasks").iterdir():
        if path.stem != "next":
            path.unlink()
    with pytest.raises(SystemExit, match="has no task but next"):
        folds_of(data, None)


def test_a_trial_that_fails_is_named_and_the_others_go_on(plan, out, inline, monkeypatch):
    def broken(self):
        raise OSError("no space left")

    monkeypatch.setattr(LEARNERS["fine"], "first", broken)
    with pytest.raises(RuntimeError, match=r"^2 trials failed: fine/tiny-0-0, fine/tiny-0-1; run again"):
        Comparison(replace(plan, methods=("fine", "probe")), out).run(1)
    assert {line["method"] for line in records.read_lines(out / "results.jsonl")} == {"probe"}


def test_the_same_trial_gives_the_same_bits(plan, comparison):
    trial = plan.trial("fine", "tiny", 0, 0)
    (first, outputs), (second, again) = conduct(trial, comparison), conduct(trial, comparison)
    assert first["test"] == second["test"]
    assert all(np.array_equal(outputs[name], again[name]) for name in outputs)


def test_the_bootstrap_draws_from_what_was_reported(plan, comparison):
    answer, outputs = conduct(plan.trial("fine", "tiny", 0, 0), comparison)
    for task, value in answer["test"][-1]["values"].items():
        parts = (outputs[f"{task}/{part}"] for part in ("value", "label"))
        ones = np.ones((1, len(outputs[f"{task}/user"])))
        assert weighted(answer["metric"][task], *parts, ones)[0] == pytest.approx(value)


@pytest.mark.parametrize(("name", "metric", "mixed"), [("segment", "accuracy", "loss"), ("next", "mrr@5", "metric")])
@pytest.mark.parametrize("stop", ["metric", "loss", "mixed"])
def test_the_metric_or_the_loss_stops_training(learner, name, metric, mixed, stop):
    made = learner("probe")
    made.learn("segment")
    values, loss = made.measure(name, "valid")
    expected = {"metric": math.log(max(values[metric], 1e-6)), "loss": -loss}
    made.world = replace(made.world, budget=replace(made.world.budget, stop=stop))
    assert made.valid_score(name) == pytest.approx(expected[mixed if stop == "mixed" else stop])


@pytest.mark.parametrize("bad", ["accuracy", ""])
def test_an_unknown_stopping_rule_is_refused(bad):
    with pytest.raises(ValueError, match="stop must be one of mixed, metric, loss"):
        Budget(stop=bad)


def test_folds_are_a_dataset_or_a_folder_of_them(comparison, tmp_path):
    assert list(folds_of(comparison / "data" / "tiny", None)) == ["tiny"]
    assert list(folds_of(comparison / "data", None)) == ["tiny"]
    with pytest.raises(SystemExit, match=r"no dataset\.json"):
        folds_of(tmp_path, None)
    with pytest.raises(SystemExit, match="--folds must be among tiny, got f9"):
        folds_of(comparison / "data", ["f9"])


def test_what_came_before_the_newest_events_is_not_known(learner):
    made = learner("probe")
    examples = made.world.dataset.examples("next", "test")
    cut_short = iterate(made.world.dataset, examples, max_tokens=500, max_len=2, seed=None)
    assert all(batch.history.older is not None for batch in cut_short)
    known = batches_of(made.world.dataset, examples, made.model, None, newest=2)
    assert all(batch.history.older is None for batch in known)


def test_forgetting_of_an_error_is_how_far_it_rose(comparison, tiny_budget):
    trial = Trial("fine", str(comparison / "data" / "tiny"), "tiny", 0, 0, tiny_budget, ("spend", "segment"))
    rows = [
        {"after": "spend", "values": {"spend": 1.0}},
        {"after": "segment", "values": {"spend": 1.5, "segment": 0.5}},
    ]
    answer = {
        "metric": {"spend": "rmse", "segment": "accuracy"},
        "test": rows,
        "seconds": {},
        "identity": trial.identity(),
    }
    answer["parameters"] = {"spend": 1, "segment": 1}
    lines = records.lines(trial, answer, "tiny")
    assert {line["task"]: line["forgetting"] for line in lines} == {"spend": 0.5, "segment": 0.0}


@pytest.mark.slow
def test_the_command_runs_in_processes_of_its_own(comparison, tmp_path):
    command = ["--data", str(comparison / "data"), "--out", str(tmp_path), "--quick", "--jobs", "2"]
    main([*command, "--methods", "popularity", "probe"])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {"popularity", "probe"}
    assert QUICK.epochs < Budget().epochs
    assert (tmp_path / "report.html").exists()
