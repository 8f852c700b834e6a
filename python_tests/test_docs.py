"""The pages keep their word: every example runs, every link and path exists, every command and key is known."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from pcl_ext import BackboneConfig, MemoryConfig
from pcl_ext.cli import build_parser
from pcl_ext.data import config
from pcl_ext.train import LearnConfig, PretrainConfig

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
# a fence; a line before it that is a file name alone, as in `shop.toml`:, names the file it holds
BLOCK = re.compile(r"(?:^`([\w./-]+)`:?\n\n?)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMPILES = [ROOT / "docs/ops.md"]  # attention in plain PyTorch is no one graph
WITH_PYTHON = [
    pytest.param(page, marks=[pytest.mark.needs_ext] if page in COMPILES else [])
    for page in PAGES
    if "```python" in page.read_text()
]


def blocks(page, *languages):
    """(file name or None, text, line of the text) of a page's fenced blocks, in order."""
    text = page.read_text()
    found = [(m[1], m[3], text.count("\n", 0, m.start(3))) for m in BLOCK.finditer(text) if m[2] in languages]
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0, f"{page}: a fence is not closed"
    return found


def prose(page):
    return BLOCK.sub("", page.read_text())


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text, _ in blocks(page, "toml", "csv", "yaml", "json"):
        if name is not None:
            Path(name).write_text(text)
    namespace = {"__name__": "docs"}
    for _, text, line in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells, namespace = json.loads(notebook.read_text())["cells"], {"__name__": "docs"}
    for number, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs: they would grow stale"
            exec(compile(text, f"{notebook.name}, cell {number}", "exec"), namespace)
        for target in re.findall(r"\]\(([^)\s]+)\)", text) if cell["cell_type"] == "markdown" else ():
            assert (notebook.parent / target).exists(), target


def anchors(page):
    """Anchors of a page's headings, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


def test_every_page_is_in_the_site():
    listed = set(re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} == listed


def paths_of_the_map():
    """Paths of CONTRIBUTING's map of the tree; two blanks go one folder down."""
    (tree,) = [text for _, text, _ in blocks(CONTRIBUTING, "text") if "pcl_ext/" in text]
    folders, paths = [], []
    for line in tree.splitlines():
        name = line.split()[0]
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        paths.append("".join(folders) + name)
        folders.append(name)
    return paths


def test_the_map_of_the_tree_is_true_and_whole():
    paths = paths_of_the_map()
    assert not [path for path in paths if not (ROOT / path).exists()]
    parts = [p for p in (ROOT / "pcl_ext").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    names = {f"pcl_ext/{p.name}{'/' if p.is_dir() else ''}" for p in parts} - {"pcl_ext/__init__.py"}
    assert names <= set(paths), "name it in CONTRIBUTING's map of the tree"


def commands(page):
    """Every `pcl ...` and `make ...` of a page's shell blocks, as arguments."""
    for _, text, _ in blocks(page, "sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for word in {"|", "&&", ";", ">", "<"} & set(words):
                words = ["\n" if w == word else w for w in words]
            for part in " ".join(shlex.quote(w) if w != "\n" else w for w in words).split("\n"):
                arguments = shlex.split(part)
                if arguments[:1] in (["pcl"], ["make"]):
                    yield arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text, _ in blocks(page, "yaml"):
        if name is not None:
            Path(name).write_text(text)
    parser, _ = build_parser()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name, *arguments in commands(page):
        if name == "pcl":
            parser.parse_args(arguments)  # exits where it does not know one
        else:
            assert {a for a in arguments if "=" not in a} <= set(targets)


TOML_TABLES = {
    "": config.TableConfig,
    "[events]": config.EventsConfig,
    "[fold]": config.FoldConfig,
    "[[task]]": config.TaskConfig,
    "items = {}": config.SubsetConfig,
    "[users]": config.UsersConfig,
    "[items]": config.ItemsConfig,
}


@pytest.mark.parametrize("table", TOML_TABLES.values(), ids=lambda table: table.__name__)
def test_every_key_of_the_toml_file_is_explained(table):
    explained = set(re.findall(r"^\| `([\w.]+)`", (ROOT / "docs/data.md").read_text(), re.MULTILINE))
    assert {f.metadata["name"] or f.name for f in dataclasses.fields(table)} <= explained


@pytest.mark.parametrize(
    ("settings", "page"),
    [
        (BackboneConfig, "docs/training-loop.md"),
        (PretrainConfig, "docs/training-loop.md"),
        (LearnConfig, "docs/training-loop.md"),
        (MemoryConfig, "docs/tasks.md"),
    ],
)
def test_every_setting_is_explained(settings, page):
    explained = set(re.findall(r"`(\w+)`", prose(ROOT / page)))
    assert {f.name for f in dataclasses.fields(settings)} <= explained
