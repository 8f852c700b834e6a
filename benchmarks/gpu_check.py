"""What is to know about the CUDA kernels on this GPU, in one run of at most 8 minutes: `make gpu-check`.

The tests on CUDA, the benchmarks, and compute-sanitizer where it is found, each a process of its own with a limit: what
fails is in the report, and the rest goes on. Writes results/gpu-<name>.md, and the numbers beside it as JSON, after
every part; a part that fails leaves its whole output there too.

  --build  compile the modules in place first, for this GPU alone, with CMake and nanobind (two minutes more: give
           --seconds 570); `make gpu-check` installs the package
  --ready  say what is missing here, and do no more
  --dry    on the CPU, with its kernels, on sizes that say nothing: does it run?
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
# Benchmarks, and the seconds each may take; the last, which compiles for most of its time, all that are left by then:
# so many, where there are, are kept for it.
PARTS = {"gpu_attention": 120, "gpu_layout": 60, "gpu_step": 160}
SANITIZER_S, BUILD_S = 180, 240  # a tool that has not ended in so many hangs
# A fault on a GPU ends the process it is in, for all that comes after it: processes of their own. What each takes, and
# the seconds it may take.
TESTS = {"tests of layout": ("not attention and not prefix", 80), "tests of attention": ("attention or prefix", 80)}
OURS = "kernel_substring=3pcl"  # the mangled name of every kernel in namespace pcl
# What each tool of compute-sanitizer watches: reads and writes outside tensors; races in shared memory, which are
# searched for an access at a time.
SANITIZED = {
    "memcheck": "longer_than_fits or huge and (stay_inside or test_embed or test_to_padded)",
    "racecheck": "test_one_short_prefix and float16 and 64",
}
COLUMNS = ["what", "ms", "% of roofline", "bound by", "best peer", "peer / ours"]


class Deadline:
    """What is left of the time, for parts that have a limit of their own."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def limit(self, seconds: float = math.inf, spare: float = 0) -> float:
        """At most so many seconds, at least one, such that `spare` of them are left."""
        return max(1.0, min(seconds, self.end - time.monotonic() - spare))


def call(command: list, seconds: float, **options) -> dict:
    """Exit code, seconds and the end of the output of a command; the code says "timeout" past the limit.

    It runs in this folder: in the root, Python would take the sources there for the package that is installed.
    """
    begin = time.monotonic()
    print("+", *command, flush=True)
    with tempfile.TemporaryFile("w+") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        try:
            process = subprocess.Popen(command, cwd=HERE, **streams, **options)
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
            code = "timeout"
        except OSError as error:
            code = str(error)
        output.seek(0)
        text = output.read()
    print(text[-2000:], flush=True)
    return {"exit code": code, "seconds": round(time.monotonic() - begin, 1), "output": text}


def build(seconds: float) -> dict:
    """Compile the modules into pcl_ext/."""
    folder = ROOT / "build/gpu-check"
    major, minor = torch.cuda.get_device_capability()
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DPCL_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real", "-DPCL_WERROR=OFF"]
    if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():  # what was chosen once has to stay
        options += ["-GNinja"]
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    options += [f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc.exists() and not shutil.which("nvcc") else []
    begin, result = time.monotonic(), call(["cmake", "-S", ROOT, "-B", folder, *options], seconds)
    if result["exit code"] == 0:
        result = call(["cmake", "--build", folder, "--parallel"], max(1.0, seconds - result["seconds"]))
    for module in [*folder.glob("_C*.so"), *folder.glob("_cuda*.so")]:
        shutil.copy(module, ROOT / "pcl_ext")
    if result["exit code"] == 0 and not list(folder.glob("_cuda*.so")):
        result["exit code"] = "no CUDA kernels were built"
    return {**result, "seconds": round(time.monotonic() - begin, 1)}


def import_in_place() -> None:
    """Here and in all processes that are started, take the package that was built in place for the one installed."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run_tests(before: list, files: list[str], options: list[str], seconds: float, **more) -> dict:
    """Tests, called as `before` says; that all were skipped is a failure."""
    paths = [ROOT / "python_tests" / name for name in files]
    command = [*before, sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--tb=short", "-rf", *paths, *options]
    result = call(command, seconds, env={**os.environ, **more})
    if result["exit code"] == 0 and not re.search(r"[1-9]\d* passed", result["output"]):
        result["exit code"] = "nothing ran"
    return result


def test(which: str, seconds: float, dry: bool) -> dict:
    """Tests of the ops, and of a model's step, on CUDA; of many failures the first say most."""
    if dry:
        return run_tests([], ["ops/test_to_packed.py"], ["-k", "undoes"], seconds)
    options = ["-m", "gpu", "-k", TESTS[which][0], "--maxfail=10"]
    return run_tests([], ["ops", "model/test_step_on_cuda.py"], options, seconds)


def sanitize(tool: str, seconds: float, dry: bool) -> dict:
    """Some tests of attention, and those with hostile values, under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if dry or not Path(program).exists():
        return {"exit code": "not run", "seconds": 0, "output": "on the CPU" if dry else "no compute-sanitizer here"}
    files = ["ops/test_prompt_attention_cuda.py", "ops/test_hostile_values.py"]
    before = [program, "--tool", tool, "--kernel-name", OURS, "--error-exitcode", "9"]
    options = ["-x", "-m", "gpu", "-k", SANITIZED[tool]]
    result = run_tests(before, files, options, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in result["output"]:
        result["exit code"] = "not run"
    return result


def measure(part: str, seconds: float, dry: bool) -> dict:
    """The rows of one benchmark; what it had measured when it was stopped is kept."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, HERE / "gpu_check.py", "--part", part, "--json", file, *["--dry"] * dry]
        result = call(command, seconds)
        kept = json.loads(file.read_text()) if file.exists() else {}
    return {**result, "rates": {}, "rows": [], "failures": [], **kept}


def run_part(part: str, file: Path, dry: bool) -> None:
    """Measure one benchmark in this process, and write after every row."""
    from gpu_measure import Bench

    torch.manual_seed(0)
    bench = Bench(dry, lambda: write_json(file, {k: getattr(bench, k) for k in ("rates", "rows", "failures")}))
    import_module(part).run(bench)


def write_json(path: Path, value: object) -> None:
    """All at once, so that a reader never sees half of it."""
    path.with_suffix(".new").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".new").replace(path)


def machine(dry: bool) -> dict:
    """What ran where."""
    import pcl_ext
    from pcl_ext import ops

    def told(*command: str) -> str:
        found = shutil.which(command[0])
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if found else "none"

    return {
        "GPU": "none: a dry run on the CPU, whose times say nothing" if dry else torch.cuda.get_device_name(),
        "driver": told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "CUDA kernels": ops.native_status("cuda"),
        "pcl_ext": f"{pcl_ext.__version__}, commit {told('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD')}",
    }


def no_device() -> str:
    """What there must be before anything is worth building; empty where it is."""
    if torch.version.cuda is None:
        install = f"{sys.executable} -m pip install --force-reinstall torch"
        return f"a torch with CUDA, which {torch.__version__} is not: install PyPI's, with `{install}`"
    return "" if torch.cuda.is_available() else "a CUDA device, and torch finds none: does nvidia-smi?"


def no_kernels() -> str:
    """Why the installed package has no CUDA kernels; empty where it has."""
    from pcl_ext import ops
    from pcl_ext.ops import _gpu

    return ops.native_status("cuda") if _gpu.CUDA is None else ""


def markdown(report: dict) -> str:
    """The whole report as one table, with what failed below it."""
    from measure import as_markdown

    benchmarks = {name: part for name, part in report["parts"].items() if name in PARTS}
    rows = [row for part in benchmarks.values() for row in part["rows"]]
    rates = next((part["rates"] for part in benchmarks.values() if part["rates"]), {})
    lines = [f"# CUDA kernels on {report['machine']['GPU']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [f"- {name}: {rate / 1e9:.4g} G{'B' if name == 'copy' else 'FLOP'}/s" for name, rate in rates.items()]
    for name, part in report["parts"].items():
        ending = (part["output"].strip().splitlines() or [""])[-1] if name not in PARTS else ""
        lines.append(f"- {name}: exit code {part['exit code']}, {part['seconds']} s. {ending}".rstrip())
    lines += ["", as_markdown(COLUMNS, [[_shown(row[column]) for column in COLUMNS] for row in rows]), ""]
    for name, part in benchmarks.items():
        for failure in part["failures"]:
            lines += [f"{name} failed at {failure.splitlines()[0]}", "", "```", failure[-1500:].strip(), "```", ""]
    return "\n".join(lines) + "\n"


def _shown(value):
    return "" if value is None else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--ready", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--part", choices=PARTS, help="measure this alone, here, into --json")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.json, arguments.dry)
        return 0
    if not arguments.dry and (missing := no_device()):
        print(f"gpu_check needs {missing}; --dry shows on the CPU that it runs", file=sys.stderr)
        return 2
    if arguments.ready:
        return 0
    name = "dry" if arguments.dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": {}, "parts": {}}
    for part, result in check(arguments.build, arguments.dry, Deadline(arguments.seconds)):
        if failed(result):
            (arguments.out / f"gpu-{name}-{part.replace(' ', '-')}.log").write_text(result["output"])
        report["parts"][part] = {**result, "output": result["output"][-6000:]}
        report["machine"] = report["machine"] or machine(arguments.dry)
        text = markdown(report)
        (arguments.out / f"gpu-{name}.md").write_text(text)
        write_json(arguments.out / f"gpu-{name}.json", report)
    print(text)
    return int(any(map(failed, report["parts"].values())))


def if_time(result: dict, seconds: float, enough: float) -> dict:
    """A part that had the `seconds` that were left: to be stopped is no failure where these were less than enough."""
    if result["exit code"] != "timeout" or seconds >= enough:
        return result
    return {**result, "exit code": "not run", "output": f"{result['output']}\nstopped: there was no more time"}


def failed(result: dict) -> bool:
    """Whether a part, or anything in it, went wrong."""
    return result["exit code"] not in (0, "not run") or bool(result.get("failures"))


def check(compile_first: bool, dry: bool, deadline: Deadline) -> Iterator[tuple[str, dict]]:
    """(name, result) of one part after another; without kernels there is nothing to test or measure."""
    if compile_first:
        result = build(deadline.limit(BUILD_S))
        import_in_place()
        yield "build", result
        if failed(result):
            return
    elif not dry and (missing := no_kernels()):
        yield "kernels", {"exit code": "not there", "seconds": 0, "output": missing}
        return
    for which, (_, limit) in TESTS.items():
        yield which, test(which, deadline.limit(limit), dry)
    *parts, last = PARTS
    for part in parts:
        yield part, measure(part, deadline.limit(PARTS[part]), dry)
    for tool in SANITIZED:  # how long they take differs from GPU to GPU
        seconds = deadline.limit(spare=PARTS[last])
        yield tool, if_time(sanitize(tool, seconds, dry), seconds, SANITIZER_S)
    seconds = deadline.limit()
    yield last, if_time(measure(last, seconds, dry), seconds, PARTS[last])


if __name__ == "__main__":
    sys.exit(main())
