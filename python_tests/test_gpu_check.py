"""`make gpu-check`, without a GPU: it runs from end to end, and one failing part does not stop the others."""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The modules of the check by name, as they see each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("check", "measure", "process", "build", "report")
    return SimpleNamespace(**{name: importlib.import_module(f"gpu_{name}") for name in names})


def test_a_failure_is_kept_apart(modules):
    kept = []
    bench = modules.measure.Bench(dry=True, after_case=lambda: kept.append(len(bench.rows)))

    def fails():
        raise RuntimeError("no such kernel")

    def good():
        ways = {"broken": fails, "torch": lambda: lambda: None, "ours, otherwise": lambda: lambda: None}
        return lambda: None, ways, modules.measure.Work(1.0)

    bench.case("bad", fails)
    bench.case("good", good)
    bench.case("bad when called", lambda: (fails, {}, modules.measure.Work(1.0)))
    assert kept == [0, 1, 1]
    assert [row["what"] for row in bench.rows] == ["good"]
    assert list(bench.rows[0]["peers"]) == ["torch", "ours, otherwise"]
    assert bench.rows[0]["best peer"] == "torch"
    assert [failure.split(": ")[0] for failure in bench.failures] == ["bad", "good, broken", "bad when called"]


def test_what_is_compiled_ahead_is_called_once_and_not_measured(modules):
    called = []
    bench = modules.measure.Bench(dry=True, once=True)
    ways = {"torch": lambda: lambda: called.append("torch")}
    bench.case("a", lambda: (lambda: called.append("ours"), ways, modules.measure.Work(1.0)))
    assert called == ["ours", "torch"]
    assert not bench.rows
    assert not bench.failures


def test_a_part_that_takes_too_long_is_stopped(modules):
    result = modules.process.call(["sh", "-c", "echo begun; sleep 60"], 1)
    assert result["exit code"] == "timeout"
    assert "begun" in result["output"]
    assert modules.process.call(["/no/such/program"], 1)["exit code"] != 0


def test_what_cannot_be_stopped_is_left(modules):
    """A process holds on to a GPU that hangs, whatever it is sent."""

    class Hangs:
        pid = None

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("it", seconds)

    sleeping = subprocess.Popen(["sleep", "60"], start_new_session=True)
    process = Hangs()
    process.pid = sleeping.pid
    assert modules.process._wait(process, 1) == "timeout"
    assert sleeping.wait(30) != 0


def test_what_a_stopped_part_has_started_stops_too(modules, tmp_path):
    """A child of its shell says that it has begun, and holds a pipe that ends with it."""
    os.mkfifo(tmp_path / "pipe")
    with open(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)) as pipe:
        command = ["sh", "-c", f"(echo begun; exec sleep 60) > '{tmp_path}/pipe' & wait"]
        assert modules.process.call(command, 1)["exit code"] == "timeout"
        os.set_blocking(pipe.fileno(), True)
        stopped = time.monotonic()
        assert pipe.read() == "begun\n"
    assert time.monotonic() - stopped < 30


def test_parts_run_together_and_a_broken_one_is_a_result(modules):
    meet = threading.Barrier(3, timeout=30)

    def breaks():
        meet.wait()
        raise KeyError("lost")

    def runs():
        meet.wait()
        return done()

    results = dict(modules.process.together({"a": runs, "b": breaks, "c": runs}))
    assert [results[name]["exit code"] for name in "abc"] == [0, "failed", 0]
    assert "KeyError: 'lost'" in results["b"]["output"]


def test_the_report_is_written_after_every_part_and_the_log_holds_all(modules, tmp_path, monkeypatch):
    told = "first fault\n" + "more\n" * 5000

    def parts(*_):
        yield "tests of attention", {"exit code": 1, "seconds": 3, "output": told}
        assert "tests of attention: exit code 1" in (tmp_path / "gpu-dry.md").read_text()
        yield "memcheck", {"exit code": 0, "seconds": 2, "output": "7 passed"}

    monkeypatch.setattr(modules.check, "check", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry", "--out", str(tmp_path)])
    assert modules.check.main() == 1
    log = (tmp_path / "gpu-dry.log").read_text()
    assert log == f"===== tests of attention: exit code 1\n{told}\n===== memcheck: exit code 0\n7 passed\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-dry.json", "gpu-dry.log", "gpu-dry.md"]
    machine = json.loads((tmp_path / "gpu-dry.json").read_text())["machine"]
    assert machine["torch"] == f"{torch.__version__}, of CUDA {torch.version.cuda}"
    assert {"GPU", "driver", "nvcc", "commit", "CUDA kernels", "python"} <= machine.keys()


def test_a_machine_that_cannot_be_asked_is_no_end(modules, monkeypatch):
    monkeypatch.setattr(modules.check, "call", lambda *_: {"exit code": 1, "seconds": 1, "output": "undefined symbol"})
    monkeypatch.setattr(modules.check, "told", lambda *command: "told")
    found = modules.check.here(False, "G")
    assert found["GPU"] == "G"
    assert found["package"] == "failed: undefined symbol"
    assert modules.process.attempt(lambda: 1 / 0)["exit code"] == "failed"


def test_tests_that_are_all_skipped_have_not_passed(modules, tmp_path):
    file = tmp_path / "test_two.py"
    file.write_text("import pytest\ndef test_runs(): pass\n@pytest.mark.skip\ndef test_skips(): pass\n")
    assert modules.check.run_tests([], [file], [], 60)["exit code"] == 0
    assert modules.check.run_tests([], [file], ["-k", "skips"], 60)["exit code"] == "nothing ran"


@pytest.mark.slow
def test_every_test_that_needs_a_gpu_is_in_one_part(modules):
    """Of all tests in the tree, each once."""

    def found(paths):
        paths = [path if path.startswith("-") else BENCHMARKS.parent / "python_tests" / path for path in paths]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only", "-m", "gpu", *paths]
        result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
        return [line for line in result.stdout.splitlines() if "::" in line]

    parts = [name for paths in modules.check.TESTS.values() for name in found(paths)]
    assert len(parts) > 400
    assert sorted(parts) == sorted(found(["."]))


def row(what, ms, share, **peers):
    return {"what": what, "ms": ms, "% of roofline": share, "bound by": "copies", "peers": peers} | {
        "best peer": None,
        "peer / ours": None,
    }


def test_the_report_shows_what_failed_and_what_is_met(modules):
    forward, both = (f"{modules.report.ATTENTION}, {name}" for name in ("forward", "forward and backward"))
    rows = [row(forward, 0.5, 76.0, varlen=1.25), row(both, 1.0, 50.0)]
    part = {
        "exit code": 1,
        "seconds": 2,
        "output": "why",
        "rates": {"copy": 3e12},
        "rows": rows,
        "failures": ["b: E\nm"],
    }
    ran = {"exit code": 0, "seconds": 1, "output": "9 passed\n"}
    stopped = {"exit code": "not run", "seconds": 1, "output": ""}
    parts = {"build": {**ran, "says": "0 of 9 kernels spill registers"}, "tests of attention": ran, "memcheck": stopped}
    text = modules.report.markdown({"machine": {"GPU": "G"}, "parts": {**parts, "gpu_attention": part}})
    for line in (
        "# CUDA kernels on G",
        "- build: exit code 0, 1 s. 0 of 9 kernels spill registers",
        "- tests of attention: exit code 0, 1 s. 9 passed",
        "- copy: 3000 GB/s",
        "| forward, share of the roofline | 75 % | 76 % | yes |",
        "| forward and backward, share of the roofline | 60 % | 50 % | no |",
        "| against varlen attention, forward | 2 x | 2.5 x | yes |",
        "| against varlen attention, forward and backward | 2 x | not measured | no |",
        "| embed, share of copy bandwidth | 80 % | not measured | no |",
        "| tests of attention | passes | exit code 0 | yes |",
        "| memcheck | passes | not run | no |",
        f"| {forward} | 0.5 | 76 | copies |  |  |",
        "gpu_attention ended with\n\n```\nwhy\n```",
        "gpu_attention failed at b: E",
    ):
        assert f"\n{line}\n" in f"\n{text}"


def test_a_package_that_is_missing_or_broken_is_reported(tmp_path):
    """Before it is built, and where it cannot be."""
    script = f"""
import sys
sys.modules["pcl_ext"] = None
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_check
from pathlib import Path
gpu_check.call = lambda *_: {{"exit code": 1, "seconds": 1, "output": "broken"}}
gpu_check.Report(Path("out"), "Some GPU 9", False).add("build", {{"exit code": 1, "seconds": 9, "output": "error"}})
print(gpu_check.no_kernels())
"""
    shown = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("broken: import of pcl_ext")
    assert "package: failed: broken" in (tmp_path / "out/gpu-some-gpu-9.md").read_text()


@pytest.mark.parametrize("option", ["--ready", "--build"])
@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (None, "needs a torch with CUDA, which .* is not: install PyPI's, with `.* install --force-reinstall torch`"),
        ("13.0", "needs a CUDA device, and torch finds none"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_built(cuda, says, option, modules, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(modules.check, "check", None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", option])
    assert modules.check.main() == 2
    assert re.search(says, capsys.readouterr().err)


def test_what_a_build_in_place_needs_is_said_too(modules, monkeypatch, capsys):
    build = modules.build
    monkeypatch.setattr(build, "no_device", lambda: "")
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "nanobind" else True)
    monkeypatch.setattr(build, "program", lambda name: None if name in ("nvcc", "ninja", "make") else name)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--build", "--ready"])
    assert modules.check.main() == 2
    says = r"needs the module nanobind; ninja or make; nvcc, on PATH, .* \(for .*\);"
    assert re.search(says, capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--ready"])
    assert modules.check.main() == 0


def done(code=0, seconds=1) -> dict:
    return {"exit code": code, "seconds": seconds, "output": ""}


@pytest.mark.parametrize("build", [False, True])
def test_what_lies_in_the_sources_is_tested_only_where_it_was_just_built(build, modules, monkeypatch, tmp_path):
    (tmp_path / "pcl_ext").mkdir()
    (tmp_path / "pcl_ext/_cuda.so").touch()
    found = []

    def call(command, seconds, **options):
        found.append(options.get("env", os.environ)["PYTHONPATH"])
        return done()

    monkeypatch.setattr(modules.build, "ROOT", tmp_path)
    monkeypatch.setattr(modules.check, "call", call)
    monkeypatch.setattr(modules.build, "build", lambda seconds: done(1))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "mine")
    parts = dict(modules.check.check(build, True, modules.check.Deadline(480)))
    assert len(found) == len(parts) - len(modules.check.SANITIZED) - 1 - build
    assert set(found) == {f"{tmp_path}:mine" if build else "mine"}
    assert (str(tmp_path) in sys.path) == build


def test_without_kernels_there_is_nothing_to_measure(modules, monkeypatch, tmp_path):
    (tmp_path / "pcl_ext").mkdir()
    (tmp_path / "pcl_ext/_cuda_emulated.so").touch()
    monkeypatch.setattr(modules.build, "ROOT", tmp_path)
    monkeypatch.setattr(modules.build, "build", lambda seconds: done(1))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    assert list(modules.check.check(True, True, modules.check.Deadline(480))) == [("build", done(1))]


# seconds there are in all, and what attention, layouts and the step are given of them
@pytest.mark.parametrize(("seconds", "given"), [(440, [120, 60, 240]), (200, [110, 60, 200]), (100, [30, 40, 100])])
def test_time_is_kept_for_what_is_asked_for(seconds, given, modules, monkeypatch):
    found = {}

    def part(name, seconds, dry):
        found[name] = seconds
        return {**done("timeout"), "failures": []}

    for kind in ("test", "measure", "sanitize"):
        monkeypatch.setattr(modules.check, kind, part)
    parts = dict(modules.check.check(False, True, modules.check.Deadline(seconds)))
    benchmarks = ["gpu_attention", "gpu_layout", "gpu_step"]
    assert list(parts)[-3:] == benchmarks
    assert [round(found[name]) for name in benchmarks] == given
    excused = {name for name in benchmarks if found[name] < modules.check.PARTS[name][1] - 1}
    assert {name for name in benchmarks if not modules.check.failed(parts[name])} == excused
    assert all(modules.check.failed(parts[which]) for which in modules.check.TESTS)


@pytest.mark.parametrize("before", [False, True])
def test_a_build_keeps_its_generator_and_the_time_of_both_steps(before, modules, monkeypatch, tmp_path):
    called = []

    def call(command, seconds):
        called.append((command, seconds))
        return done(seconds=200)

    folder = tmp_path / "build/gpu-check"
    folder.mkdir(parents=True)
    (tmp_path / "pcl_ext").mkdir()
    old = [folder / "_cuda.so", tmp_path / "pcl_ext/_cuda.so"]
    for module in old:
        module.touch()
    if before:
        (folder / "CMakeCache.txt").write_text("CMAKE_GENERATOR:INTERNAL=Unix Makefiles\n")
    monkeypatch.setattr(modules.build, "ROOT", tmp_path)
    monkeypatch.setattr(modules.build, "BUILT", folder)
    monkeypatch.setattr(modules.build, "call", call)
    monkeypatch.setattr(modules.build, "program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    result = modules.build.build(240)
    assert result["exit code"] == "no CUDA kernels were built"
    assert result["seconds"] == 400
    assert ("-GNinja" in called[0][0]) == (not before)
    assert "-k" in called[1][0]
    assert [seconds for _, seconds in called] == [240, 40]
    assert not any(map(Path.exists, old))  # what an older build has left is not tested


def test_kernels_that_spill_are_named(modules):
    line = "ptxas info : Function properties for {}\n    {} bytes stack frame, {} bytes spill stores, 0 bytes loads\n"
    assert modules.build._spills(line.format("a", 8, 0)) == "0 of 1 kernels spill registers"
    text = line.format("a", 0, 0) + line.format("b", 16, 24)
    assert modules.build._spills(text) == "1 of 2 kernels spill registers: b (24 bytes)"


@pytest.mark.slow
@pytest.mark.needs_ext
def test_it_runs_from_end_to_end(tmp_path, modules):
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--dry", "--seconds", "900", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
    report, check = json.loads((tmp_path / "gpu-dry.json").read_text()), modules.check
    assert set(report["parts"]) == {*check.TESTS, *check.PARTS, *check.SANITIZED, check.AHEAD}
    rows = {name: report["parts"][name]["rows"] for name in check.PARTS}
    assert {name: len(found) for name, found in rows.items()} == {"gpu_layout": 12, "gpu_attention": 7, "gpu_step": 2}
    asked = modules.report.asked([row for found in rows.values() for row in found])
    assert all(shown != "not measured" for _, _, shown, _ in asked)
