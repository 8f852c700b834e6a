"""The report: what it says, that it stands alone, and that it lives with anything a record may hold or lack."""

import base64
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

from pcl_ext.metrics import ResultMatrix
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.report import parts, report
from pcl_ext.report.content import gather
from pcl_ext.store import read_manifest, save_pretrained
from pcl_ext.task import TaskSpec

pytest.importorskip("matplotlib")
VALUES = {"next": 0.2, "ctr": 0.7, "spend": 12.0}
SPECS = {"next": TaskSpec("next", "items"), "ctr": TaskSpec("ctr", "binary"), "spend": TaskSpec("spend", "regression")}
PICTURES = ["curves.png", "matrix.png", "references.png", "sizes.png"]
EVIL = '<script>alert(1)</script> & "x" $\\frac{ \n'


def make_record(last=None):
    """A whole record; `last` replaces values in the last row of the matrix."""
    metric = {name: spec.metric for name, spec in SPECS.items()}
    matrix = ResultMatrix(SPECS, metric)
    rows = [{name: {metric[name]: VALUES[name]} for name in list(SPECS)[: i + 1]} for i in range(3)]
    for task, value in (last or {}).items():
        rows[-1][task] = {metric[task]: value}
    for row in rows:
        matrix.append(row)
    trivial, cheap = {"next": 0.02, "ctr": 0.5, "spend": 20.0}, {"next": 0.15, "ctr": 0.7001, "spend": 11.0}
    return {
        "dataset": {"name": "shop", "sha256": "ab" * 32, "users": {"train": 80, "valid": 5, "test": 15}},
        "protocol": {"ranking": "full", "ties": "expected rank"},
        "config": {"learn": {"lr": 0.01, "amp": False}, "readout": ["last", "mean"]},
        "machine": {"threads": 2},
        "matrix": matrix.to_json(),
        "standard_error": {name: {metric[name]: 0.01} for name in SPECS},
        "references": {
            name: {
                "trivial": {"name": "constant", "metrics": {metric[name]: trivial[name]}},
                "cheap": {"name": "ridge", "metrics": {metric[name]: cheap[name]}},
            }
            for name in SPECS
        },
        "curves": {
            name: [{"epoch": e, "loss": 1 / (e + 1), "valid": {metric[name]: e}, "best": e == 2} for e in range(4)]
            for name in SPECS
        },
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(20, dim=4, num_layers=1, max_len=6)))
    model.freeze_backbone()
    for spec in SPECS.values():
        model.add_task(spec, MemoryConfig(prompt_len=2))
        model.freeze_task(spec.name)
    return model


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Small pictures: drawing is most of the time."""
    monkeypatch.setattr("pcl_ext.report.charts.DPI", 20)


class Page(HTMLParser):
    """Text, tags and attributes of a page, and whether every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.words, self.attributes, self.open, self.sections = [], [], [], {}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def show(tmp_path, model, record):
    save_pretrained(model, tmp_path / "run", record)
    return Page(report(tmp_path / "run"))


def test_the_page_says_what_was_learned(tmp_path, model):
    page = show(tmp_path, model, make_record())
    for text in [
        "User model on shop",
        "3 tasks learned",
        "0 forgetting (first - last): mean of R[j, j] - R[last, j] over 2 earlier tasks",
        "3 of 3 tasks at least 3 standard errors over trivial",
        "2 of 3 tasks not below their cheap reference",
        "next items mrr@5 0.2000 ± 0.0100 0.0200 0.1500 +18.0 above (ridge)",
        "ctr binary auc 0.7000 ± 0.0100 0.5000 0.7001 +20.0 tie (ridge)",
        "spend regression rmse 12.00 ± 0.0100 20.00 11.00 +800.0 below (ridge)",
        "mean 0, worst 0. Max - last: mean 0, worst 0. Backward transfer, mean R[last, j] - R[j, j]: 0.",
        "ranking full",
        "users.test 15",
        "learn.amp no",
        "readout last, mean",
        "threads 2",
    ]:
        assert text in page.text
    assert "record" not in page.text.replace("records", "")  # nothing is missing


@pytest.mark.parametrize(
    ("last", "text"), [({"next": 0.1}, "0.05 forgetting"), ({"spend": 12.0, "ctr": 0.8}, "-0.05 forgetting")]
)
def test_forgetting_is_computed(tmp_path, model, last, text):
    assert text in show(tmp_path, model, make_record(last)).text


def test_the_page_stands_alone(tmp_path, model):
    page = show(tmp_path, model, make_record())
    folder = tmp_path / "run" / "report"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*PICTURES, "report.html"])
    sources = [value for tag, name, value in page.attributes if name in ("src", "href", "action", "data")]
    pictures = {base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources}
    assert pictures == {(folder / name).read_bytes() for name in PICTURES}
    assert all(picture.startswith(b"\x89PNG\r\n") for picture in pictures)
    assert not re.search(
        r"https?:|//|url\(|@import|<script|<link", re.sub('base64,[^"]*', "", (folder / "report.html").read_text())
    )


def test_sizes_are_those_of_the_files(tmp_path, model):
    show(tmp_path, model, {})
    content = gather(read_manifest(tmp_path / "run"))
    sizes = {file.name.rsplit("-", 1)[0]: file.stat().st_size for file in (tmp_path / "run" / "tasks").iterdir()}
    assert {task.name: task.size for task in content.tasks} == sizes
    assert content.backbone_size == next((tmp_path / "run").glob("backbone-*")).stat().st_size


MISSING = {
    ("matrix",): "The record holds no result matrix.",
    ("references",): "The record lacks a reference for: next, ctr, spend.",
    ("curves",): "The record holds no learning curves.",
    ("standard_error",): "mrr@5 0.2000 0.0200",
    ("dataset", "protocol", "config", "machine"): "The record holds nothing on this: protocol.",
}


@pytest.mark.parametrize("parts", MISSING, ids=str)
def test_what_is_missing_is_said(tmp_path, model, parts):
    record = make_record()
    for part in parts:
        del record[part]
    text = show(tmp_path, model, record).text
    assert MISSING[parts] in text
    assert text.count("holds nothing on this") == (4 if len(parts) == 4 else 0)


def test_a_part_for_one_task_only(tmp_path, model):
    record = make_record()
    for part in ("references", "curves", "standard_error"):
        record[part] = {"ctr": record[part]["ctr"]}
    text = show(tmp_path, model, record).text
    assert "The record lacks a reference for: next, spend." in text
    assert "No learning curve in the record for: next, spend." in text


def test_an_empty_record_and_no_task(tmp_path):
    model = UserModel(Backbone(BackboneConfig(5, dim=4, num_layers=1)))
    text = show(tmp_path, model, {}).text
    assert "0 tasks learned" in text
    assert "No task is closed yet." in text


def test_one_task_has_nothing_to_forget(tmp_path, model):
    record = make_record()
    record["matrix"]["rows"] = record["matrix"]["rows"][:1]
    text = show(tmp_path, model, record).text
    assert "Forgetting needs a second task." in text
    assert "forgetting (" not in text


def test_text_is_escaped_everywhere(tmp_path, model):
    record = make_record()
    record["dataset"] |= {"name": EVIL, EVIL: EVIL}
    record["protocol"] = record["config"] = record["machine"] = {EVIL: [EVIL, {EVIL: None}], "a": {EVIL: EVIL}}
    for part in record["references"].values():
        part["cheap"]["name"] = EVIL
    record["matrix"]["tasks"][2] = EVIL
    record["matrix"]["metric"][EVIL] = "rmse"
    record["matrix"]["rows"][2][EVIL] = record["matrix"]["rows"][2].pop("spend")
    page = show(tmp_path, model, record)
    assert not [entry for entry in page.attributes if entry[0] == "script"]
    assert EVIL.split("\n")[0].strip() in page.text


def test_a_curve_of_one_epoch(tmp_path, model):
    record = make_record()
    record["curves"] = {"next": record["curves"]["next"][:1]}
    assert "No learning curve in the record for: ctr, spend." in show(tmp_path, model, record).text


def test_out_is_a_folder_and_may_be_there(tmp_path, model):
    save_pretrained(model, tmp_path / "run", make_record())
    for _ in range(2):
        page = report(str(tmp_path / "run"), tmp_path / "deep" / "pages")
        assert page == tmp_path / "deep" / "pages" / "report.html"
    assert not (tmp_path / "run" / "report").exists()


def test_settings_that_all_tasks_share_are_said_once(tmp_path, model):
    record = make_record()
    record["config"] = {
        "seed": 3,
        "tasks": {"ctr": {"lr": 0.1, "learn": {"epochs": 5}}, "next": {"lr": 0.2, "learn": {"epochs": 5}}},
    }
    text = show(tmp_path, model, record).text
    assert "seed 3 ctr: lr 0.1 next: lr 0.2 every task: learn.epochs 5" in text


def test_without_matplotlib_it_says_what_to_install(tmp_path, model, monkeypatch):
    save_pretrained(model, tmp_path / "run", make_record())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[cli\]' in the sources of pcl_ext"):
        report(tmp_path / "run")


def test_cells_are_escaped_and_have_their_class():
    rows = [["a<b", *parts.numbers(["1", "2\n3"])], [("x", "key")]]
    want = '<tr><td>a&lt;b</td><td class="n">1</td><td class="n">2\n3</td></tr><tr><td class="key">x</td></tr>'
    assert parts.table([], rows) == f"<table>{want}</table>"
    assert parts.table(["h"], []) == "<table><tr><th>h</th></tr></table>"
