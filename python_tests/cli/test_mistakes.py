"""Every mistake a user may make at the command line gives exit status 2 and one line, never a traceback."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from pcl_ext import loop, run, store
from pcl_ext.cli import build_parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["events"], "events needs --config"),
        (["events", "--config", "none.toml"], "none.toml is missing"),
        (["ml-1m"], "ml-1m needs --from"),
        (["online-retail"], "online-retail needs --from"),
        (["ml-1m", "--from", "nowhere"], "nowhere"),
        (["online-retail", "--from", "nowhere"], "nowhere"),
        (["synthetic", "--users", "0"], "num_users must be an integer from 1 up, got 0"),
        (["synthetic", "--users", "many"], '"users"'),
        (["synthetic", "--rotate", "7"], "rotate must be"),
        (["synthetic", "--from", "here"], "--from is for online-retail and ml-1m, not for synthetic"),
        (["events", "--config", "a.toml", "--users", "7"], "--users is for synthetic, not for events"),
        (["ml-1m", "--from", "here", "--seed", "0"], "--seed is for synthetic, not for ml-1m"),
        (["lastfm"], "invalid choice: 'lastfm'"),
    ],
    ids=str,
)
def test_prepare_refuses(refused, tmp_path, argv, message):
    assert message in refused("prepare", *argv, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("pretrain", "pretrain: {epoks: 2}", "pretrain.epoks"),
        ("pretrain", "backbone: {num_items: 2}", "backbone.num_items"),
        ("pretrain", "colour: red", "colour"),
        ("pretrain", "backbone: {dim: wide}", "backbone.dim"),
        ("pretrain", "pretrain: {precision: int8}", "precision must be float32 or bfloat16"),
        ("learn", "learn: {epoks: 2}", "learn.epoks'; did you mean learn.epochs? --help says"),
        ("learn", "memory: {prompt_len: 2}", "memory.prompt_len"),
        ("learn", "memory: {readout: [first]}", "readout must name"),
        ("learn", "learn: {epochs: 0}", "epochs must be a whole number from 1 up, got 0"),
        ("learn", "learn: [", "config"),
        ("learn", "", "--config must be a file of settings in YAML or JSON, got ''; --help"),
        ("pretrain", 'name = "shop"\n[events]\n', "in YAML or JSON, got 'name = \"shop\"'; --help"),
    ],
)
def test_settings_that_are_not_known_are_refused(made, refused, tmp_path, command, text, message):
    (tmp_path / "config.yaml").write_text(text)
    argv = [made.data, "--out", tmp_path / "new"] if command == "pretrain" else [made.run, "loyal", "--data", made.data]
    assert message in refused(command, *argv, "--config", tmp_path / "config.yaml")
    assert not (tmp_path / "new").exists()


def test_settings_that_are_no_text_are_refused(made, refused, tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"PAR1\xf0")
    line = refused("learn", made.run, "--data", made.data, "--config", tmp_path / "config.yaml")
    assert line.startswith("pcl: 'utf-8' codec can't decode")


def test_help_does_not_call_the_tasks_of_learn_required():
    (tasks,) = [action for action in build_parser()[1]["learn"]._actions if action.dest == "tasks"]
    assert not tasks.required


@pytest.mark.parametrize("command", ["learn", "evaluate"])
def test_stray_values_are_told_where_they_belong(made, refused, command):
    message = refused(command, made.run, "--data", made.data, "loyal")
    where = "values come right behind their --option, the tasks of pcl learn before all options"
    assert f"unrecognized arguments: loyal; {where}" in message


@pytest.mark.parametrize(
    "line",
    ["1 2 3", "[1, 2", "3", "{}", '{"item": [1]}', '{"items": 3}', '{"items": ["1"]}', "null"]
    + ["[1.5]", '["1"]', "[true]", "[null]", "[" * 99_999, f"[{2**63}]"],
)
def test_predict_names_the_line_that_is_broken_and_answers_those_before(made, pcl, line):
    stdin = f"[1]\n{line}\n[2]\n"
    status, answers, errors = pcl("predict", made.run, "--task", "next", stdin=stdin)
    assert (status, len(answers)) == (2, 1)
    assert 'line 2 must be a JSON list of item ids, or an object with such a list as its "items", got' in errors[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "subcommand"),
        (["teach"], "invalid choice: 'teach'"),
        (["pretrain", "DATA"], "the following arguments are required: --out; --help"),
        (["pretrain", "nowhere", "--out", "NEW"], "nowhere must be a dataset folder, dataset.json is missing"),
        (["pretrain", "RUN", "--out", "NEW"], "must be a dataset folder"),
        (["pretrain", "DATA", "--out", "NEW", "--max-len", "0"], "max_len must be a whole number from 1 up, got 0"),
        (["pretrain", "DATA", "--out", "NEW", "--config", "none.yaml"], "none.yaml"),
        (["pretrain", "DATA", "--out", "DATA/dataset.json"], "dataset.json"),
        (["pretrain", "DATA", "--out", "DATA"], "is the folder of a dataset; choose another one for the run"),
        (["learn", "RUN", "--data", "nowhere"], "nowhere must be a dataset folder"),
        (["learn", "nowhere", "--data", "DATA"], "nowhere/manifest.json is missing; name the folder of a run"),
        (["learn", "DATA", "--data", "DATA"], "manifest.json is missing"),
        (
            ["learn", "RUN", "churn", "--data", "DATA"],
            "TASK must be one of next, click, loyal, .*, the tasks of .*, got churn",
        ),
        (["learn", "RUN", "loyal", "--data", "DATA", "--placement", "top"], "invalid choice: 'top'"),
        (
            ["learn", "RUN", "loyal", "--data", "DATA", "--prompt-len", "-1"],
            "prompt_len must be a whole number from 0 up, got -1",
        ),
        (["evaluate"], "the following arguments are required: RUN, --data; --help"),
        (["evaluate", "nowhere", "--data", "DATA"], "manifest.json is missing"),
        (["evaluate", "RUN", "--data", "DATA", "--fold", "all"], "invalid choice: 'all'"),
        (["evaluate", "RUN", "--data", "DATA", "--json", "DATA/dataset.json/x"], "dataset.json"),
        (["predict", "RUN"], "task"),
        (["predict", "nowhere", "--task", "next"], "manifest.json is missing"),
        (["predict", "RUN", "--task", "churn"], "task must be one of next, click, .*, got 'churn'"),
        (["predict", "RUN", "--task", "next", "--k", "0"], "k must be at least 1, got 0"),
        (["predict", "RUN", "--task", "next", "--k", "ten"], "Got value: ten"),
        (["encode", "RUN", "--data", "DATA"], "out"),
        (["encode", "nowhere", "--data", "DATA", "--out", "NEW"], "manifest.json is missing"),
        (["encode", "RUN", "--data", "nowhere", "--out", "NEW"], "nowhere must be a dataset folder"),
        (
            ["encode", "RUN", "--data", "DATA", "--out", "NEW", "--tasks", "churn"],
            "task must be one of next, click, .*, got 'churn'",
        ),
        (["encode", "RUN", "--data", "DATA", "--out", "DATA/dataset.json"], "dataset.json is there and is no Parquet"),
        (
            ["encode", "RUN", "--data", "DATA", "--out", "DATA/histories.parquet"],
            "histories.parquet is there and was not made by pcl encode; choose another file",
        ),
        (
            ["encode", "RUN", "--data", "DATA", "--out", "NEW.csv"],
            "--out is written as Parquet: name it so, got new.csv",
        ),
        (["predict", "RUN", "--task", "click", "--data", "DATA"], "--data and --out come together"),
        (["predict", "RUN", "--task", "click", "--out", "NEW"], "--data and --out come together"),
        (["export", "RUN"], "required: --task; --help"),
        (["export", "RUN", "--task", "churn"], "task must be one of next, click, .*, got 'churn'"),
        (["export", "RUN", "--task", "click", "--formats", "jit"], "formats"),
        (["export", "nowhere", "--task", "click"], "manifest.json is missing"),
        (["verify", "nowhere"], "nowhere/manifest.json is missing; name the folder of a run"),
        (["verify", "DATA"], "manifest.json is missing; name the folder of a run"),
        (["report", "DATA"], "manifest.json is missing"),
        (["report", "RUN", "--out", "DATA/dataset.json"], "dataset.json"),
        (["demo", "--data", "nowhere", "--out", "NEW"], "nowhere must be a dataset folder"),
        (["info", "--all"], "--all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(made, refused, tmp_path, argv, message):
    places = {"DATA": made.data, "RUN": made.run, "NEW": str(tmp_path / "new")}
    for name, place in places.items():
        argv = [word.replace(name, place) for word in argv]
    line = refused(*argv)
    assert line.startswith("pcl")
    assert re.search(message, line), line


@pytest.mark.parametrize("command", ["pretrain", "learn", "evaluate", "verify"])
def test_a_run_of_another_dataset_is_refused(made, refused, tmp_path, command):
    other = shutil.copytree(made.data, tmp_path / "other", ignore=shutil.ignore_patterns(".cache"))
    header = json.loads((other / "dataset.json").read_text()) | {"name": "other"}
    (other / "dataset.json").write_text(json.dumps(header))
    argv = {
        "pretrain": [other, "--out", made.run, "--config", made.folder / "pretrain.yaml"],
        "learn": [made.run, "loyal", "--data", other],
    }
    line = refused(command, *argv.get(command, [made.run, "--data", other]))
    assert f"{made.run} was made from the dataset synthetic " in line
    assert f"{other} is other " in line


@pytest.mark.parametrize("command", ["learn", "evaluate"])
def test_a_dataset_that_lost_a_task_is_refused(made, refused, tmp_path, command):
    other = shutil.copytree(made.data, tmp_path / "other")
    for file in (other / "tasks").glob("click.*"):
        file.unlink()
    line = refused(command, made.run, *(["loyal"] if command == "learn" else []), "--data", other)
    assert f"{other} has no table of click, which {made.run} has learned" in line


def test_a_run_in_pretraining_says_how_it_goes_on(made, pcl, refused, tmp_path, monkeypatch):
    def stop(*args):
        raise OSError("stopped")

    argv = ["pretrain", made.data, "--out", tmp_path / "run", "--config", made.folder / "pretrain.yaml"]
    for module, name in ((run, "_references"), (loop, "_end_epoch")):  # before the first step, and after some
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            assert pcl(*argv)[0] == 2
        for command in (["predict", "--task", "next"], ["verify"], ["learn", "--data", made.data], ["report"]):
            line = refused(command[0], tmp_path / "run", *command[1:])
            assert "manifest.json is missing; the run is still in pretraining: repeat pcl pretrain" in line
    assert pcl(*argv)[0] == 0


def test_a_run_in_use_is_refused(made, refused, copy):
    with store.lock(copy):
        assert "copy is in use by process" in refused("learn", copy, "loyal", "--data", made.data)


def test_what_would_be_forgotten_is_not_saved(made, pcl, copy, monkeypatch):
    before = (copy / "manifest.json").read_bytes()
    monkeypatch.setattr(run, "compare_outputs", lambda record, scores: {"spend": "changed"})
    status, out, err = pcl("learn", copy, "loyal", "--data", made.data, "--learn.epochs", 1)
    assert (status, out) == (1, [])
    assert err[-1] == "pcl learn: learning 'loyal' changed the outputs of closed tasks: spend"
    assert (copy / "manifest.json").read_bytes() == before


def test_a_run_without_a_record(made, pcl, refused, tmp_path):
    store.save_pretrained(store.from_pretrained(made.run), tmp_path / "bare")
    for argv in (["learn", tmp_path / "bare", "loyal"], ["evaluate", tmp_path / "bare"]):
        assert "has no record of the dataset it was made from" in refused(*argv, "--data", made.data)
    status, out, _ = pcl("verify", tmp_path / "bare")
    assert status == 0
    assert out[1].strip() == "outputs not compared: the run has no record of the dataset it was made from"
    assert pcl("predict", tmp_path / "bare", "--task", "click", stdin="[1]\n")[0] == 0
    assert pcl("report", tmp_path / "bare")[0] == 0


def test_a_missing_package_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert refused("info") == "the package jsonargparse is missing: pip install '.[cli]' in the sources of pcl_ext"


def test_a_package_that_only_one_command_needs(made, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install '.[cli]' in the sources of pcl_ext" in refused("report", made.run)


def test_a_reader_that_stops_reading_is_no_mistake(tmp_path):
    command, pipe = [sys.executable, "-m", "pcl_ext.cli", "info"], subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
