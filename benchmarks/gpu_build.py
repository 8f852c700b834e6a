"""Compile the modules in place, for this GPU alone, with the Python that runs: no network, nothing is installed."""

import os
import re
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from gpu_process import call

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build/gpu-check"
MODULES = ("nanobind", "numpy", "safetensors", "pytest")
PROGRAMS = {"cmake": ["cmake"], "a C++ compiler": ["c++", "g++", "clang++"], "ninja or make": ["ninja", "make"]}
# What ptxas says of a kernel: its name, and then how many bytes of registers it keeps in memory.
SPILLS = re.compile(r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores")


def program(name: str) -> str | None:
    """Where a program is: on PATH, beside this Python, or where CUDA installs its own."""
    folders = (os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/cuda/bin")
    return shutil.which(name, path=os.pathsep.join(folders))


def compiler() -> str | None:
    """nvcc, or what CUDACXX names in its place."""
    return os.environ.get("CUDACXX") or program("nvcc")


def no_device() -> str:
    """What there must be before anything is worth building; empty where it is."""
    if find_spec("torch") is None:
        return f"a torch with CUDA, and {sys.executable} has none"
    import torch

    if torch.version.cuda is None:
        install = f"{sys.executable} -m pip install --force-reinstall torch"
        return f"a torch with CUDA, which {torch.__version__} is not: install PyPI's, with `{install}`"
    return "" if torch.cuda.is_available() else "a CUDA device, and torch finds none: does nvidia-smi?"


def no_tools() -> str:
    """What else a build in place needs, and its tests; empty where it is."""
    missing = [f"the module {name}" for name in MODULES if find_spec(name) is None]
    missing += [what for what, names in PROGRAMS.items() if not any(map(program, names))]
    missing += [] if compiler() else ["nvcc, on PATH, in /usr/local/cuda/bin or named by CUDACXX"]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing += [] if header.exists() else [f"Python's headers ({header})"]
    return f"{'; '.join(missing)} (for {sys.executable})" if missing else ""


def build(seconds: float) -> dict:
    """Compile the modules into pcl_ext/. One of them that fails does not stop the other."""
    import torch

    old = [*BUILT.glob("_*.so"), *(ROOT / "pcl_ext").glob("_*.so")]
    for module in old:
        module.unlink()
    major, minor = torch.cuda.get_device_capability()
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DPCL_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release"]
    options += [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real", f"-DCMAKE_CUDA_COMPILER={compiler()}"]
    options += ["-DCMAKE_CUDA_FLAGS=-Xptxas=-v", "-DPCL_WERROR=OFF", "-DPCL_CUDA_EMULATED=OFF"]
    ninja, before = program("ninja"), BUILT / "CMakeCache.txt"
    if ninja and not before.exists():  # what was chosen once has to stay
        options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    cmake = program("cmake") or "cmake"
    result = call([cmake, "-S", ROOT, "-B", BUILT, *options], seconds)
    if result["exit code"] != 0:
        return result
    with_ninja = before.exists() and "CMAKE_GENERATOR:INTERNAL=Ninja" in before.read_text()
    go_on = ["-k", "0"] if with_ninja else ["-k"]
    jobs = str(os.cpu_count() or 1)
    compiled = call([cmake, "--build", BUILT, "--parallel", jobs, "--", *go_on], max(1.0, seconds - result["seconds"]))
    for module in [*BUILT.glob("_C.*so"), *BUILT.glob("_cuda.*so")]:
        shutil.copy(module, ROOT / "pcl_ext")
    if compiled["exit code"] == 0 and not is_built():
        compiled["exit code"] = "no CUDA kernels were built"
    both = {
        "seconds": round(result["seconds"] + compiled["seconds"], 1),
        "output": result["output"] + compiled["output"],
    }
    return {**compiled, **both, "says": _spills(compiled["output"])}


def is_built() -> bool:
    """Whether the CUDA kernels are in place."""
    return any((ROOT / "pcl_ext").glob("_cuda.*so"))


def _spills(output: str) -> str:
    """Which kernels keep registers in memory, by what the compiler said of those that it compiled now."""
    found = SPILLS.findall(output)
    spilling = [f"{name} ({size} bytes)" for name, size in found if int(size)]
    return f"{len(spilling)} of {len(found)} kernels spill registers{': ' if spilling else ''}{', '.join(spilling)}"


def import_in_place() -> None:
    """Here and in all processes that are started, take the package that was built in place for the one installed."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
