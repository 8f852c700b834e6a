"""Every command of `pcl`, as a user types it: what it prints, and what it writes."""

import errno
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pcl_ext import commands, infer, ops, store
from pcl_ext.cli import main
from pcl_ext.data import Dataset
from pcl_ext.run import PROTOCOL
from pcl_ext.task import TaskSpec
from pcl_ext.train import LearnConfig, PretrainConfig

TASKS = ["click", "segment", "spend", "range"]


def record_of(run):
    return store.read_manifest(run)["record"]


def test_prepare_synthetic(pcl, refused, tmp_path):
    status, out, err = pcl("prepare", "synthetic", "--out", tmp_path / "new", "--users", 40, "--seed", 3)
    assert (status, err) == (0, [])
    assert out[0] == f"{tmp_path / 'new'}: 40 users, 500 items"
    assert [line.split(":")[0].strip() for line in out[1:]] == ["next", "click", "loyal", "range", "segment", "spend"]
    assert "  segment: 4 classes, accuracy, 40 rows" in out
    assert Dataset(tmp_path / "new").info["synthetic"]["seed"] == 3
    assert "must be a new or an empty folder" in refused("prepare", "synthetic", "--out", tmp_path / "new")


def test_prepare_events(pcl, refused, tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\nann,x\nann,y\nbob,z\nbob,x\n")
    (tmp_path / "shop.toml").write_text('name = "shop"\n[events]\nfile = "log.csv"\n')
    status, out, _ = pcl("prepare", "events", "--config", tmp_path / "shop.toml", "--out", tmp_path / "shop")
    assert status == 0
    assert out[0].endswith("shop: 2 users, 3 items")
    (tmp_path / "shop.toml").write_text('name = "shop"\n[events]\nfile = "log.csv"\nusr = "x"\n')
    line = refused("prepare", "events", "--config", tmp_path / "shop.toml", "--out", tmp_path / "other")
    assert "shop.toml: [events]: unknown key 'usr'" in line
    assert not (tmp_path / "other").exists()


def test_pretrain_takes_its_settings_from_the_file(made, pcl, refused):
    config = record_of(made.run)["config"]
    assert (config["backbone"]["dim"], config["backbone"]["max_len"], config["pretrain"]["epochs"]) == (16, 20, 2)
    file = made.folder / "pretrain.yaml"
    status, out, err = pcl("pretrain", made.data, "--out", made.run, "--config", file)  # complete: left as it is
    assert (status, err, out[0].split()[:2]) == (0, [], ["after", "next"])
    line = refused("pretrain", made.data, "--out", made.run, "--config", file, "--backbone.dim", 32)
    assert "was made with backbone.dim = 16, this call has 32; choose another run folder" in line


def test_pretrain_says_which_events_it_does_not_read(made, pcl, tmp_path):
    lengths = np.diff(Dataset(made.data).offsets)
    epochs = ["--pretrain.epochs", 1, "--backbone.dim", 8, "--backbone.num_layers", 1]
    _, _, err = pcl("pretrain", made.data, "--out", tmp_path / "short", "--max-len", 3, *epochs)
    users = f"{(lengths > 3).sum()} of {len(lengths)} users have more than 3 events"
    events = f"{np.maximum(lengths - 3, 0).sum():,} of {lengths.sum():,} events are older"
    who = "of tasks only item memories read them"
    assert err[0] == f"pcl pretrain: {users}: {events}, and {who}; --max-len takes more, in more time"
    _, _, err = pcl("pretrain", made.data, "--out", tmp_path / "long", "--max-len", lengths.max(), *epochs)
    assert not [line for line in err if "no task reads" in line]


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda"])
def test_a_device_that_is_not_there_is_refused(made, refused, tmp_path, monkeypatch, device):
    monkeypatch.setenv("LOCAL_RANK", "63")  # under torchrun each process takes a GPU of its own
    data, out = ["--data", made.data], ["--out", tmp_path / "out"]
    commands = ["pretrain", made.data, *out], ["learn", made.run, *data], ["encode", made.run, *data, *out]
    for argv in (*commands, ["predict", made.run, "--task", "click"]):
        called = "cuda:63" if device == "cuda" else device
        assert f"--device {called} cannot be used here: " in refused(*argv, "--device", device)
    assert not (tmp_path / "out").exists()


def test_a_gpu_without_memory_is_told_in_a_line(made, refused, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(commands, "learn_all", full)
    line = refused("learn", made.run, "click", "--data", made.data)
    assert line.startswith("pcl learn: CUDA out of memory: a smaller batch_tokens")


def test_learn_takes_its_settings_from_the_file_and_the_line(made):
    tasks = record_of(made.run)["config"]["tasks"]
    memory = {"placement": "both", "prompt_len": 3, "readout": ["last", "mean"], "contextual": "texts"}
    assert memory.items() <= tasks["click"]["memory"].items()
    assert tasks["click"]["learn"]["epochs"] == 2
    assert tasks["click"]["learn"]["head_rate"] == 0.01
    assert tasks["spend"]["memory"]["placement"] == "prefix"
    assert list(tasks) == TASKS


def test_a_log_has_a_line_an_epoch(made, pcl, copy):
    _, _, err = pcl("learn", copy, "loyal", "--data", made.data, "--learn.epochs", 2)
    curve = record_of(copy)["curves"]["loyal"]
    kept = max(entry["epoch"] for entry in curve if entry["best"])
    for line, entry in zip(err, curve):
        values = "  ".join(f"{name} {value:.4f}" for name, value in entry["valid"].items())
        best = "  best so far" if entry["best"] else ""
        assert line == f"loyal epoch {entry['epoch']}  loss {entry['loss']:.4f}  {values}{best}"
    auc = curve[kept]["valid"]["auc"]
    assert err[2:] == [f"loyal: epoch {kept} (of 2, from 0) is kept, auc {auc:.4f} on the valid users"]


def test_learn_leaves_a_known_task_alone(made, pcl):
    before = record_of(made.run)
    status, out, _ = pcl("learn", made.run, "click", "next", "--data", made.data)
    assert status == 0
    assert [line.split("; ")[1] for line in out[:2]] == ["learned before, left as it is"] * 2
    assert record_of(made.run) == before


def test_learn_says_what_it_compared(made, pcl, copy):
    status, out, err = pcl("learn", copy, "--data", made.data, "--learn.epochs", 1)  # all that is left: loyal
    assert status == 0
    assert [line.split("  ")[0].split(",")[0] for line in err] == ["loyal epoch 0", "loyal: epoch 0 (of 1"]
    assert [line.split(":")[0] for line in out[:5]] == ["click", "loyal", "range", "segment", "spend"]
    assert out[1].endswith("outputs of 5 earlier tasks unchanged, bit for bit")
    assert list(record_of(copy)["outputs"]) == ["next", *TASKS, "loyal"]


def test_evaluate_writes_what_the_run_recorded(made, pcl, tmp_path):
    status, out, err = pcl("evaluate", made.run, "--data", made.data, "--json", tmp_path / "deep" / "results.json")
    assert (status, err) == (0, [])
    assert [line.split()[0] for line in out if line[:16].strip()] == ["next", *TASKS]
    result = json.loads((tmp_path / "deep" / "results.json").read_text())
    record = record_of(made.run)
    assert {"tasks", "matrix", "forgetting", "protocol"} <= set(result)
    assert result["tasks"] == record["matrix"]["rows"][-1]
    assert result["matrix"] == record["matrix"]
    assert result["forgetting"]["worst"] == 0
    assert set(PROTOCOL) < set(result["protocol"])
    assert result["protocol"]["dataset"] == f"synthetic {Dataset(made.data).sha256}"
    assert result["references"] == {name: record["references"][name] for name in result["tasks"]}
    for reference in record["references"]["click"].values():  # below the task's own line
        metrics = "  ".join(f"{metric} {value:.4f}" for metric, value in reference["metrics"].items())
        assert f"{'':16}  {metrics}  ({reference['name']})" in out[4:6]
    valid = pcl("evaluate", made.run, "--data", made.data, "--fold", "valid")[1]
    assert len(valid) == 1 + len(TASKS)  # the references were measured on the test users
    assert valid[0] != out[0]


def test_results_are_replaced_whole_or_not_at_all(made, pcl, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    status, _, err = pcl("evaluate", made.run, "--data", made.data, "--json", file)
    assert (status, err) == (2, [f"pcl evaluate: [Errno {errno.ENOSPC}] No space left: '{tmp_path}'"])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "old"


def test_results_go_to_what_is_no_plain_file(made, pcl, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "results.json")
    assert pcl("evaluate", made.run, "--data", made.data, "--json", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    assert "matrix" in json.loads((tmp_path / "results.json").read_text())


def test_verify(made, pcl):
    status, out, err = pcl("verify", made.run)
    assert (status, err) == (0, [])
    assert out[0].endswith("tensors match their hashes")
    assert out[1:] == [f"  {name}: outputs on all test users, bit for bit: equal" for name in ["next", *TASKS]]


def test_a_run_that_was_measured_on_a_sample_says_so(made, pcl, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "FEWEST", 5)
    monkeypatch.setattr(infer, "MOST_MEASURED", 9 * 50)  # 50 items
    run, config, result = tmp_path / "run", made.folder / "pretrain.yaml", tmp_path / "result.json"
    pcl("pretrain", made.data, "--out", run, "--config", config)
    pcl("learn", run, "click", "--data", made.data, "--learn.epochs", "1")
    whole = len(Dataset(made.data).examples("next", "test"))
    sample = f"9 of {whole} examples"
    _, out, _ = pcl("verify", run)
    assert out[1:] == [
        f"  next: outputs on {sample}, bit for bit: equal",
        "  click: outputs on all test users, bit for bit: equal",
    ]
    _, out, _ = pcl("evaluate", run, "--data", made.data, "--json", result)
    assert out[0].endswith(f"(9 targets, {sample})")
    assert json.loads(result.read_text())["protocol"]["samples"] == {"next": sample}
    monkeypatch.setattr(infer, "MOST_MEASURED", 11 * 50)  # another sample than that of the run
    status, out, _ = pcl("verify", run)
    assert status == 0
    assert out[1].endswith("not compared: it was measured on another sample")
    pcl("learn", run, "segment", "--data", made.data, "--learn.epochs", "1")
    _, out, _ = pcl("verify", run)
    assert out[1] == f"  next: outputs on 11 of {whole} examples, bit for bit: equal"
    sample = f"11 of {whole} examples"
    pcl("report", run, "--out", tmp_path / "page")
    assert f"Measured on a sample: next, {sample}." in next((tmp_path / "page").glob("*.html")).read_text()


def test_verify_finds_damage(made, pcl, copy):
    file = next((copy / "tasks").glob("click-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, out, err = pcl("verify", copy)
    assert (status, out, len(err)) == (1, [], 1)
    assert f"{file} tensor " in err[0]
    assert "sha256 differs" in err[0]


def test_verify_finds_a_task_that_changed(made, pcl, copy):
    model, record = store.from_pretrained(copy), record_of(copy)
    model.task("click").head.linear.bias += 1
    store.save_pretrained(model, copy, record)
    status, out, _ = pcl("verify", copy)
    assert status == 1
    assert [line.split(":")[-1].strip() for line in out[1:]] == ["equal", "changed", "equal", "equal", "equal"]


def test_report(made, pcl, tmp_path):
    status, out, err = pcl("report", made.run, "--out", tmp_path / "page")
    assert (status, out, err) == (0, [str(tmp_path / "page" / "report.html")], [])
    assert "segment" in (tmp_path / "page" / "report.html").read_text()


def test_info(pcl):
    status, out, err = pcl("info")
    assert (status, err) == (0, [])
    assert f"torch {torch.__version__}" in out[0]
    assert "1 threads" in out[1]
    assert out[2].startswith("kernels: ")


def test_demo_on_a_folder(made, pcl, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "DEMO_PRETRAIN", PretrainConfig(epochs=1))
    monkeypatch.setattr(commands, "DEMO_LEARN", LearnConfig(epochs=1))
    status, out, err = pcl("demo", "--data", made.data, "--out", tmp_path / "demo")
    names = ("next", "click", "loyal", "range", "segment", "spend")
    assert (status, [line.split("  ")[0] for line in err[::2]]) == (0, [f"{name} epoch 0" for name in names])
    assert [line.split(":")[0] for line in err[1::2]] == list(names)
    assert "forgetting 0 (bitwise: all outputs of 6 tasks compared)" in out
    assert out[-1] == f"report: {tmp_path / 'demo' / 'run' / 'report' / 'report.html'}"
    assert (tmp_path / "demo" / "run" / "report" / "report.html").is_file()
    assert not (tmp_path / "demo" / "dataset").exists()
    monkeypatch.setattr(ops, "native_build", lambda: "another")
    status, out, _ = pcl("demo", "--data", made.data, "--out", tmp_path / "demo")
    assert status == 1
    assert "nothing is proven: bits can be compared on the machine that made" in out[-1]


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["learn", "--help"]], ids=str)
def test_help_and_version(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert ("--memory.contextual" in out) == ("type: path" in out) == ("learn" in argv)
    assert "<class" not in out


def test_learn_counts_what_it_compared(made, pcl, copy, tmp_path):
    """The table of click was replaced since: its outputs are compared with nothing, its results are of the new one."""
    shutil.copytree(made.data, tmp_path / "data")
    path = tmp_path / "data" / "tasks" / "click.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "target", pa.array(1 - table["target"].to_numpy())), path)
    header = tmp_path / "data" / "dataset.json"
    header.write_text(header.read_text().replace('"sha256"', '"was"'))
    status, out, _ = pcl("learn", copy, "loyal", "--data", tmp_path / "data", "--learn.epochs", 1)
    assert status == 0
    want = "outputs of 4 earlier tasks unchanged, bit for bit; click not compared: its table is another now"
    assert out[0].endswith(want)
    record = record_of(copy)
    assert "click" not in record["references"]
    assert record["standard_error"]["click"] != record_of(made.run)["standard_error"]["click"]
    left = f"  1 of {len(TASKS) + 2} tasks not compared: nothing is proven of them"
    assert pcl("verify", copy, "--data", tmp_path / "data")[1][-1] == left
    record["dataset"]["path"] = str(tmp_path / "data")
    store.save_pretrained(store.from_pretrained(copy), copy, record)
    assert pcl("verify", copy)[1][-1] == f"{left}; --data names another folder, with the tables they were learned from"


def test_a_task_that_no_run_taught(made, pcl, copy):
    """Added by hand to a run's model: one with a table is measured, what has none is left out, and both are named."""
    model = store.from_pretrained(copy)
    for name in ("loyal", "mine"):
        model.add_task(TaskSpec(name, "binary"))
        model.freeze_task(name)
    store.save_pretrained(model, copy)
    status, out, err = pcl("evaluate", copy, "--data", made.data)
    assert (status, err) == (0, [f"pcl evaluate: {made.data} has no table of mine, which is left out"])
    assert [line.split()[0] for line in out if line[:16].strip()] == ["next", *TASKS, "loyal"]
    status, out, _ = pcl("learn", copy, "loyal", "click", "--data", made.data)
    assert status == 0
    assert out[0] == "loyal: known to the model, which this run did not teach it: no result"
    assert out[1].endswith("learned before, left as it is")
    status, out, _ = pcl("verify", copy, "--data", made.data)
    assert status == 0
    assert "  mine: outputs on all test users, bit for bit: not compared: this run did not teach it" in out
    assert pcl("verify", copy)[1][-1].endswith("tasks not compared: nothing is proven of them")
