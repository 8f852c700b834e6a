"""What is to know about the CUDA kernels on this GPU, in one run of at most 8 minutes: `make gpu-check`.

The tests on CUDA, compute-sanitizer where it is found, and the benchmarks, each a process of its own with a limit: what
fails is in the report, and the rest goes on. Writes gpu-<name>.md, .json and .log (the whole output of every part) into
benchmarks/results/ after every part.

  --build  compile the modules in place first, for this GPU alone, with CMake and nanobind: nothing is installed
  --ready  say what is missing here (with --build, for that too), and do no more
  --dry    on the CPU, with its kernels, on sizes that say nothing: does it run?
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import gpu_build
from gpu_process import HERE, attempt, call, together
from gpu_report import machine, markdown

ROOT = HERE.parent
# All of it, of 480 s: a machine that is new takes long to load torch, before and between, and a part to be stopped.
ALL_S, BUILD_S, TESTS_S = 440, 240, 130
# Benchmarks, each first with what is asked for: seconds that are kept for it, where there are, and that it may take.
PARTS = {"gpu_attention": (30, 120), "gpu_layout": (30, 60), "gpu_step": (60, 240)}
# A fault on a GPU ends the process it is in, for all that comes after it: processes of their own, at the same time.
ATTENTION, ALONE = "ops/test_prompt_attention_cuda.py", "ops/test_cuda.py"
TESTS = {
    "tests of attention": [ATTENTION],
    "tests of the other ops": ["ops", *(f"--ignore={ROOT / 'python_tests' / file}" for file in (ATTENTION, ALONE))],
    "tests of graphs, streams, compiling": [ALONE],
    "tests of a model": ["model/test_step_on_cuda.py"],
    "tests of training and use": ["test_other_device.py"],
}
OURS = "kernel_substring=3pcl"  # the mangled name of every kernel in namespace pcl
# What each tool of compute-sanitizer watches: reads and writes outside tensors (what torch asks a driver in vain is no
# error); races in shared memory, which are searched for an access at a time.
SANITIZED = {
    "memcheck": "longer_than_fits or huge and (stay_inside or test_embed or test_to_padded)",
    "racecheck": "test_one_short_prefix and float16 and 64",
}
SETTINGS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
AHEAD = "compiling ahead"


class Deadline:
    """What is left of the time, for parts that have a limit of their own."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def limit(self, seconds: float = math.inf, spare: float = 0, least: float = 1) -> float:
        """At most so many seconds, such that `spare` of them are left unless that leaves fewer than `least`."""
        left = self.end - time.monotonic()
        return max(1.0, min(seconds, left, max(left - spare, least)))


def run_tests(before: list, paths: list[str], options: list[str], seconds: float, **more) -> dict:
    """Tests, called as `before` says; that all were skipped is a failure."""
    paths = [path if str(path).startswith("-") else ROOT / "python_tests" / path for path in paths]
    settings = ["-o", "addopts=", "-o", "faulthandler_timeout=40", "-p", "no:cacheprovider"]
    shown = ["-v", "--tb=short", "-rf", "--durations=5", "--continue-on-collection-errors"]
    command = [*before, sys.executable, "-m", "pytest", *settings, *shown, *paths, *options]
    result = call(command, seconds, env={**os.environ, "OMP_NUM_THREADS": "2", **more})  # others run at the same time
    if result["exit code"] == 0 and not re.search(r"[1-9]\d* passed", result["output"]):
        result["exit code"] = "nothing ran"
    return result


def test(which: str, seconds: float, dry: bool) -> dict:
    """Tests of the ops, and of a model, on CUDA; of many failures the first say most."""
    if dry:
        return run_tests([], ["ops/test_to_packed.py"], ["-k", "undoes"], seconds)
    return run_tests([], TESTS[which], ["-m", "gpu", "--maxfail=10"], seconds)


def sanitize(tool: str, seconds: float, dry: bool) -> dict:
    """Some tests of attention, and those with hostile values, under a tool of compute-sanitizer."""
    program = gpu_build.program("compute-sanitizer")
    if dry or program is None:
        return {"exit code": "not run", "seconds": 0, "output": "on the CPU" if dry else "no compute-sanitizer here"}
    files = [ATTENTION, "ops/test_hostile_values.py"]
    before = [program, "--tool", tool, *SETTINGS[tool], "--kernel-name", OURS, "--error-exitcode", "9"]
    options = ["-x", "-m", "gpu", "-k", SANITIZED[tool]]
    result = run_tests(before, files, options, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in result["output"]:
        result["exit code"] = "not run"
    return stopped(result)


def ahead(seconds: float, dry: bool) -> dict:
    """Call what torch compiles in the benchmarks once, for them to find it compiled; what goes wrong, they say."""
    if dry:
        return {"exit code": "not run", "seconds": 0, "output": "on the CPU"}
    result = call([sys.executable, HERE / "gpu_check.py", "--part", *reversed(PARTS), "--ahead"], seconds)
    return {**result, "exit code": "not run" if result["exit code"] else 0, "says": "whatever it says is no failure"}


def measure(part: str, seconds: float, dry: bool) -> dict:
    """The rows of one benchmark; what it had measured when it was stopped is kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, HERE / "gpu_check.py", "--part", part, "--json", file, *["--dry"] * dry]
        result = call(command, seconds)
        kept = json.loads(file.read_text()) if file.exists() else {}
    return {**result, "rates": {}, "rows": [], "failures": [], **kept}


def run_parts(parts: list[str], file: Path | None, dry: bool, once: bool) -> None:
    """Measure benchmarks in this process, and write after every row; once: call everything a single time instead."""
    import torch
    from gpu_measure import Bench

    if once and torch.cuda.mem_get_info()[0] < 64e9:
        return  # tests run at the same time
    torch.manual_seed(0)
    keys = ("rates", "rows", "failures")
    bench = Bench(dry, lambda: file and write_json(file, {k: getattr(bench, k) for k in keys}), once)
    for part in parts:
        import_module(part).run(bench)


def write_json(path: Path, value: object) -> None:
    """All at once, so that a reader never sees half of it."""
    path.with_suffix(".new").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".new").replace(path)


def no_kernels() -> str:
    """Why the installed package has no CUDA kernels; empty where it has."""
    try:
        from pcl_ext import ops
        from pcl_ext.ops import _gpu
    except ImportError as error:
        return f"broken: {error}"
    return ops.native_status("cuda") if _gpu.CUDA is None else ""


def told(*command: str) -> str:
    """What a command says, in a line."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        found = ""
    return found.strip().replace("\n", "; ") or "does not say"


def here(dry: bool, gpu: str) -> dict:
    """What ran where; asked in a process of its own, which may fail."""
    result = call([sys.executable, HERE / "gpu_check.py", "--machine"], 60)
    found = re.findall(r"^\{.*\}$", result["output"], re.MULTILINE)
    return {
        "GPU": "none: a dry run on the CPU, whose times say nothing" if dry else gpu,
        "driver": told("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"),
        "nvcc": told(gpu_build.compiler() or "nvcc", "--version").split("; ")[-1],
        "commit": told("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        **(json.loads(found[-1]) if found else {"package": f"failed: {result['output'][-300:]}"}),
    }


def stopped(result: dict) -> dict:
    """A part that is no failure where there was too little time for it."""
    if result["exit code"] != "timeout":
        return result
    return {**result, "exit code": "not run", "output": f"{result['output']}\nstopped: there was no more time"}


def failed(result: dict) -> bool:
    """Whether a part, or anything in it, went wrong."""
    return result["exit code"] not in (0, "not run") or bool(result.get("failures"))


def check(compile_first: bool, dry: bool, deadline: Deadline) -> Iterator[tuple[str, dict]]:
    """(name, result) of one part after another; without kernels there is nothing to test or measure."""
    if compile_first:
        result = attempt(lambda: gpu_build.build(deadline.limit(BUILD_S)))
        gpu_build.import_in_place()
        yield "build", result
        if not gpu_build.is_built():
            return
    elif not dry and (missing := no_kernels()):
        yield "kernels", {"exit code": "not there", "seconds": 0, "output": missing}
        return
    seconds = deadline.limit(TESTS_S)
    runs = {which: partial(test, which, seconds, dry) for which in TESTS}
    runs |= {tool: partial(sanitize, tool, seconds, dry) for tool in SANITIZED}
    yield from together(runs | {AHEAD: partial(ahead, seconds, dry)})
    for i, (part, (least, most)) in enumerate(PARTS.items()):
        seconds = deadline.limit(most, sum(kept for kept, _ in [*PARTS.values()][i + 1 :]), least)
        result = attempt(partial(measure, part, seconds, dry))
        yield part, stopped(result) if seconds < most else result


class Report:
    """The page, the numbers and the whole output of a run, written anew after every part."""

    def __init__(self, folder: Path, gpu: str, dry: bool):
        name = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        self.stem, self.dry, self.gpu = folder / f"gpu-{name}", dry, gpu
        self.report = {"machine": {"GPU": gpu}, "parts": {}}
        self.stem.with_suffix(".log").write_text("")

    def add(self, part: str, result: dict) -> None:
        """Keep what a part gave."""
        with self.stem.with_suffix(".log").open("a") as log:
            log.write(f"===== {part}: exit code {result['exit code']}\n{result['output']}\n")
        if not self.report["parts"]:
            self.report["machine"] = here(self.dry, self.gpu)
        self.report["parts"][part] = {**result, "output": result["output"][-6000:]}
        self.text = markdown(self.report)
        self.stem.with_suffix(".md").write_text(self.text)
        write_json(self.stem.with_suffix(".json"), self.report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--ready", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=ALL_S, help="for everything")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="measure these alone, here, into --json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ahead", action="store_true", help="with --part: call everything once, and measure nothing")
    parser.add_argument("--machine", action="store_true", help="say what runs here, in JSON")
    arguments = parser.parse_args()
    if arguments.part:
        run_parts(arguments.part, arguments.json, arguments.dry, arguments.ahead)
        return 0
    if arguments.machine:
        print(json.dumps(machine()))
        return 0
    missing = "" if arguments.dry else gpu_build.no_device() or (arguments.build and gpu_build.no_tools())
    if missing:
        print(f"gpu_check needs {missing}; --dry shows on the CPU that it runs", file=sys.stderr)
        return 2
    return 0 if arguments.ready else check_all(arguments)


def check_all(arguments: argparse.Namespace) -> int:
    """All parts; 1 where one of them failed."""
    gpu = "none"
    if not arguments.dry:
        import torch

        gpu = torch.cuda.get_device_name()
    report = Report(arguments.out, gpu, arguments.dry)
    for part, result in check(arguments.build, arguments.dry, Deadline(arguments.seconds)):
        report.add(part, result)
    print(report.text)
    return int(any(map(failed, report.report["parts"].values())))


if __name__ == "__main__":
    sys.exit(main())
