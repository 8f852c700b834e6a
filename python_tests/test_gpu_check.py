"""`make gpu-check`, without a GPU: it runs from end to end, and one failing part does not stop the others."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """gpu_check and gpu_measure, as they see each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check"), importlib.import_module("gpu_measure")


def test_a_failure_is_kept_apart(modules):
    _, gpu_measure = modules
    kept = []
    bench = gpu_measure.Bench(dry=True, after_case=lambda: kept.append(len(bench.rows)))

    def fails():
        raise RuntimeError("no such kernel")

    def good():
        return lambda: None, {"broken": fails, "torch": lambda: lambda: None}, gpu_measure.Work(1.0)

    bench.case("bad", fails)
    bench.case("good", good)
    bench.case("bad when called", lambda: (fails, {}, gpu_measure.Work(1.0)))
    assert kept == [0, 1, 1]
    assert [row["what"] for row in bench.rows] == ["good"]
    assert list(bench.rows[0]["peers"]) == ["torch"]
    assert [failure.split(": ")[0] for failure in bench.failures] == ["bad", "good, broken", "bad when called"]


def test_a_part_that_takes_too_long_is_stopped(modules):
    gpu_check, _ = modules
    result = gpu_check.call(["sh", "-c", "echo begun; sleep 60"], 1)
    assert result["exit code"] == "timeout"
    assert "begun" in result["output"]
    assert gpu_check.call(["/no/such/program"], 1)["exit code"] != 0


def test_what_a_stopped_part_has_started_stops_too(modules, tmp_path):
    """A child of its shell says that it has begun, and holds a pipe that ends with it."""
    gpu_check, _ = modules
    os.mkfifo(tmp_path / "pipe")
    with open(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)) as pipe:
        command = ["sh", "-c", f"(echo begun; exec sleep 60) > '{tmp_path}/pipe' & wait"]
        assert gpu_check.call(command, 1)["exit code"] == "timeout"
        os.set_blocking(pipe.fileno(), True)
        stopped = time.monotonic()
        assert pipe.read() == "begun\n"
    assert time.monotonic() - stopped < 30


def test_the_report_is_written_after_every_part_and_a_failure_leaves_its_whole_output(modules, tmp_path, monkeypatch):
    gpu_check, _ = modules
    told = "first fault\n" + "more\n" * 5000

    def parts(*_):
        yield "tests of layout", {"exit code": 1, "seconds": 3, "output": told}
        assert "tests of layout: exit code 1" in (tmp_path / "gpu-dry.md").read_text()
        yield "tests of attention", {"exit code": 0, "seconds": 2, "output": "7 passed"}

    monkeypatch.setattr(gpu_check, "check", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    assert (tmp_path / "gpu-dry-tests-of-layout.log").read_text() == told
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-dry-tests-of-layout.log",
        "gpu-dry.json",
        "gpu-dry.md",
    ]


def test_tests_that_are_all_skipped_have_not_passed(modules, tmp_path):
    gpu_check, _ = modules
    file = tmp_path / "test_two.py"
    file.write_text("import pytest\ndef test_runs(): pass\n@pytest.mark.skip\ndef test_skips(): pass\n")
    assert gpu_check.run_tests([], [file], [], 60)["exit code"] == 0
    assert gpu_check.run_tests([], [file], ["-k", "skips"], 60)["exit code"] == "nothing ran"


def test_the_report_shows_what_failed(modules):
    gpu_check, _ = modules
    row = {
        "what": "a copy",
        "ms": 0.5,
        "% of roofline": 50.0,
        "bound by": "copies",
        "best peer": None,
        "peer / ours": None,
    }
    part = {
        "exit code": 1,
        "seconds": 2,
        "output": "",
        "rates": {"copy": 3e12},
        "rows": [row],
        "failures": ["b: E\nmore"],
    }
    ran = {"exit code": 0, "seconds": 1, "output": "9 passed\n"}
    report = {"machine": {"GPU": "G"}, "parts": {"tests of layout": ran, "gpu_layout": part, "memcheck": ran}}
    text = gpu_check.markdown(report)
    assert "# CUDA kernels on G" in text
    assert "- tests of layout: exit code 0, 1 s. 9 passed" in text
    assert "| a copy | 0.5 | 50 | copies |  |  |" in text
    assert "copy: 3000 GB/s" in text
    assert "gpu_layout failed at b: E" in text


@pytest.mark.parametrize("option", ["--ready", "--build"])
@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (None, "needs a torch with CUDA, which .* is not: install PyPI's, with `.* install --force-reinstall torch`"),
        ("13.0", "needs a CUDA device, and torch finds none"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_built(cuda, says, option, modules, monkeypatch, capsys):
    gpu_check, _ = modules
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "check", None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", option])
    assert gpu_check.main() == 2
    assert re.search(says, capsys.readouterr().err)


def done(code=0, seconds=1) -> dict:
    return {"exit code": code, "seconds": seconds, "output": ""}


@pytest.mark.parametrize("build", [False, True])
def test_what_lies_in_the_sources_is_tested_only_where_it_was_just_built(build, modules, monkeypatch, tmp_path):
    gpu_check, _ = modules
    (tmp_path / "pcl_ext").mkdir()
    (tmp_path / "pcl_ext/_C.so").touch()
    found = []

    def call(command, seconds, **options):
        found.append(options.get("env", os.environ)["PYTHONPATH"])
        return done()

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "call", call)
    monkeypatch.setattr(gpu_check, "build", lambda seconds: done())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "mine")
    parts = dict(gpu_check.check(build, True, gpu_check.Deadline(480)))
    assert len(found) == len(parts) - len(gpu_check.SANITIZED) - build
    assert set(found) == {f"{tmp_path}:mine" if build else "mine"}
    assert (str(tmp_path) in sys.path) == build


@pytest.mark.parametrize(("seconds", "excused"), [(480, False), (150, True)])
def test_what_is_stopped_has_failed_unless_there_was_too_little_time(seconds, excused, modules, monkeypatch):
    gpu_check, _ = modules
    given = {}

    def part(name, seconds, dry):
        given[name] = seconds
        return {**done("timeout"), "failures": []}

    for kind in ("test", "measure", "sanitize"):
        monkeypatch.setattr(gpu_check, kind, part)
    parts = dict(gpu_check.check(False, True, gpu_check.Deadline(seconds)))
    last = [*gpu_check.SANITIZED, "gpu_step"]
    assert list(parts) == [*gpu_check.TESTS, "gpu_attention", "gpu_layout", *last]
    assert [name for name, part in parts.items() if not gpu_check.failed(part)] == (last if excused else [])
    left = [80, 320, 480] if seconds == 480 else [80, 1, 150]
    assert [round(given[name]) for name in ("tests of layout", "memcheck", "gpu_step")] == left


@pytest.mark.parametrize("before", [False, True])
def test_a_build_keeps_its_generator_and_the_time_of_both_steps(before, modules, monkeypatch, tmp_path):
    gpu_check, _ = modules
    called = []

    def call(command, seconds):
        called.append((command, seconds))
        return done(seconds=200)

    folder = tmp_path / "build/gpu-check"
    folder.mkdir(parents=True)
    if before:
        (folder / "CMakeCache.txt").write_text("CMAKE_GENERATOR:INTERNAL=Unix Makefiles\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "call", call)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_check.build(240)["exit code"] == "no CUDA kernels were built"
    assert ("-GNinja" in called[0][0]) == (not before)
    assert [seconds for _, seconds in called] == [240, 40]


@pytest.mark.slow
@pytest.mark.needs_ext
def test_it_runs_from_end_to_end(tmp_path, modules):
    gpu_check, _ = modules
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--dry", "--seconds", "900", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    report = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert set(report["parts"]) == {*gpu_check.TESTS, *gpu_check.PARTS, *gpu_check.SANITIZED}
    rows = {name: len(report["parts"][name]["rows"]) for name in gpu_check.PARTS}
    assert rows == {"gpu_layout": 12, "gpu_attention": 7, "gpu_step": 2}
    assert "prompt-tuning step" in (tmp_path / "gpu-dry.md").read_text()
