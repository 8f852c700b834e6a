"""The tree keeps its promises: who may import whom, what kernels may know, what is never torch's at build time."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pcl_ext"

# Each part and what it may import besides itself; a part that is not named composes the others, and none of these may
# import it.
MAY_IMPORT = {
    "task": set(),
    "ops": set(),
    "batch": {"ops"},
    "model": {"task", "ops", "batch"},
    "progress": set(),
    "data": {"task", "ops", "batch", "progress"},
    "metrics": {"task"},
    "baselines": {"task", "ops", "batch", "data", "metrics", "progress"},
    "store": {"task", "model"},
    "serve": {"task", "ops", "batch", "model", "data", "store", "progress"},
    "report": {"task", "metrics", "store"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The first name below the package: a module or a folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "pcl_ext":
            found |= {f"pcl_ext.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    names = {name.split(".")[1] for name in found if name.startswith("pcl_ext.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize(
    "path", [f for f in FILES if part_of(f) in MAY_IMPORT], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_arrows(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part}
    assert imports_of(path) <= allowed, f"{part} may import {sorted(allowed)}"


@pytest.mark.parametrize("path", [f for f in FILES if part_of(f) != "cli"], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_imports_the_command_line(path):
    assert "cli" not in imports_of(path)


def test_the_reference_needs_only_torch():
    tree = ast.parse((PACKAGE / "ops/reference.py").read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {name.name for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
    assert {m.split(".")[0] for m in modules} <= {"torch", "numpy", "itertools", "heapq"}


SOURCES = sorted((ROOT / "csrc").rglob("*.[ch]*"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_know_neither_python_nor_torch(path):
    includes = re.findall(r"#include [<\"](.*)[>\"]", path.read_text())
    known = [name for name in includes if re.search(r"python|nanobind|torch|ATen|omp\.h", name, re.IGNORECASE)]
    assert not known or (path.name == "bindings.cpp" and all(n.startswith("nanobind/") for n in known))


@pytest.mark.parametrize("path", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_intrinsics_only_in_files_of_one_instruction_set(path):
    if re.search(r"#include <(\w*intrin|arm_neon)\.h>", path.read_text()):
        assert re.search(r"_(avx2|avx512|amx|neon)", path.name)


def test_torch_is_no_build_dependency():
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert "torch" not in requires


def test_files_stay_readable():
    too_long = {str(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 400}
    assert not too_long
