"""What is exported answers as the model does, for any batch and length, without this package."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from stores import SPECS, make_model

from pcl_ext import Backbone, BackboneConfig, MemoryConfig, PackedBatch, TaskSpec, UserModel
from pcl_ext import export as export_module
from pcl_ext.export import PlainModel, export

TASKS = ["next", "range_b", "ctr", "age", "spend"]
HISTORIES = [[1, 2, 3], [], [5] * 9, [20, 99, 7, -1], [11, 8, 15, 16, 2, 3, 4, 8], [0]]
PARTS = [HISTORIES, HISTORIES[:1], HISTORIES[2:4], [[3]], [[0]], [[0]] * 3, [[]], [[], []]]
DOCS = Path(__file__).parent.parent / "docs"


def padded(histories, front=False):
    longest = max(map(len, histories))
    rows = [([0] * (longest - len(h)) + h) if front else (h + [0] * (longest - len(h))) for h in histories]
    return torch.tensor(rows, dtype=torch.int64)


def output(model, task, histories):
    with torch.no_grad():
        return model(PackedBatch.from_lists(histories, num_items=20, max_len=6), task)


@pytest.fixture(scope="module")
def model():
    return make_model(*TASKS)


def with_repeats(placement):
    model = make_model(placement=placement)
    spec = TaskSpec("again", "items", repeats=True, catalogue=(19, 2, 5, 7, 11, 3))
    readout = ("last", "mean", "item_memory")
    config = MemoryConfig(placement=placement, prompt_len=2, readout=readout, item_width=4)
    task = model.add_task(spec, config)
    for parameter in task.parameters():
        parameter.data.normal_()
    model.freeze_task("again")
    return model.eval()


@pytest.mark.parametrize("front", [False, True], ids=["padded behind", "padded in front"])
@pytest.mark.parametrize("placement", ["none", "tail", "prefix", "both", "layers"])
@pytest.mark.parametrize("task", [*TASKS, "again"])
def test_the_plain_model_is_the_model(task, placement, front):
    model = with_repeats(placement) if task == "again" else make_model(task, placement=placement)
    plain = PlainModel(model, task).eval()
    for histories in PARTS:
        torch.testing.assert_close(plain(padded(histories, front)), output(model, task, histories))


def closed(**options):
    model = make_model("next", "age")
    task = model.add_task(SPECS["ctr"], MemoryConfig(placement="none", **options))
    for parameter in task.parameters():
        parameter.data.normal_()
    model.freeze_task("ctr")
    return model.eval()


@pytest.mark.parametrize(
    "options", [{"readout": ("item_memory",), "item_rows": 5}, {"readout": ("last", "pooled"), "members": 2}], ids=str
)
def test_the_plain_model_is_the_model_for_hashed_rows_and_learned_pooling(options):
    model = closed(**options)
    plain = PlainModel(model, "ctr").eval()
    for histories in PARTS:
        torch.testing.assert_close(plain(padded(histories)), output(model, "ctr", histories))


@pytest.mark.parametrize(
    ("name", "options"),
    [("low_rank", {"low_rank": 2, "readout": ("last",)}), ("earlier", {"readout": ("last", "earlier")})],
)
def test_a_memory_without_a_plain_form_is_refused(name, options, tmp_path):
    model = closed(**options)
    with pytest.raises(ValueError, match=f"task 'ctr' reads {name}, which cannot be exported yet"):
        export(model, "ctr", tmp_path)


@pytest.mark.parametrize("options", [{"positions": "rotary"}, {"kind": "nextitnet"}], ids=str)
def test_a_backbone_without_a_plain_form_is_refused(options, tmp_path):
    model = UserModel(Backbone(BackboneConfig(20, dim=4, max_len=6, **options)))
    model.freeze_backbone()
    model.add_task(SPECS["ctr"])
    model.freeze_task("ctr")
    with pytest.raises(ValueError, match="'learned_from_end' can be exported, got kind='(trans|next)"):
        export(model, "ctr", tmp_path)


@pytest.mark.parametrize(("wrong_by", "refused"), [(3e-6, False), (3e-5, True)])
@pytest.mark.parametrize("unit", [1e4, 1.0, 1e-6])
def test_a_regression_is_compared_in_its_own_unit(unit, wrong_by, refused):
    """unit: the deviation of its targets."""
    model = make_model("spend")
    head = model.task("spend").head
    head.unit.copy_(torch.tensor([0.0, unit]))
    head.linear.weight.zero_()
    head.linear.bias.zero_()  # nothing may be wrong because a value is large
    plain = PlainModel(model, "spend")
    with pytest.raises(ValueError, match="does not answer as the run") if refused else nullcontext():
        export_module._check(model, "spend", "program", lambda items: plain(items) + unit * wrong_by)


def check(run, model, task):
    for histories in PARTS:
        torch.testing.assert_close(run(padded(histories)), output(model, task, histories))


@pytest.mark.parametrize("task", TASKS)
def test_the_program(model, tmp_path, task):
    files, left_out = export(model, task, tmp_path / "out", ["program"])
    assert (files, left_out) == ({"program": tmp_path / "out" / f"{task}.program.pt2"}, {})
    check(torch.export.load(files["program"]).module(), model, task)
    facts = json.loads((tmp_path / "out" / f"{task}.json").read_text())
    assert TaskSpec.from_json(facts["task"]) == SPECS[task]
    assert facts["max_len"] == 6
    assert len(list((tmp_path / "out").iterdir())) == 2


ALONE = """
import sys, torch
sys.modules["pcl_ext"] = None
answer = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]))
torch.save(answer, sys.argv[3])
"""


@pytest.mark.slow
def test_the_program_needs_nothing_of_this_package(model, tmp_path):
    files, _ = export(model, "ctr", tmp_path, ["program"])
    torch.save(padded(HISTORIES), tmp_path / "items")
    command = [sys.executable, "-c", ALONE, files["program"], tmp_path / "items", tmp_path / "answer"]
    subprocess.run(command, check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "answer"), output(model, "ctr", HISTORIES))


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the package is compiled by g++")


@pytest.fixture(scope="module", params=["range_b", "ctr"])
def package(request, model, tmp_path_factory):
    files, _ = export(model, request.param, tmp_path_factory.mktemp("package"), ["package"])
    return request.param, files["package"]


@pytest.mark.slow
@needs_compiler
def test_the_package_in_python(model, package):
    task, file = package
    assert file.name == f"{task}.pt2"
    check(torch._inductor.aoti_load_package(str(file)), model, task)


@pytest.mark.slow
@needs_compiler
def test_the_package_in_cpp(model, package, tmp_path):
    """docs/serve.cpp, compiled as its page says."""
    task, file = package
    torch_folder, program = Path(torch.__file__).parent, tmp_path / "serve"
    assert len((DOCS / "serve.cpp").read_text().splitlines()) <= 40
    folders = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", DOCS / "serve.cpp", *folders, *libraries, "-o", program], check=True)
    lines = "".join(" ".join(map(str, history)) + "\n" for history in HISTORIES)
    done = subprocess.run([program, file], input=lines, capture_output=True, text=True, check=True)
    got = torch.tensor([[float(number) for number in line.split()] for line in done.stdout.splitlines()])
    torch.testing.assert_close(got, output(model, task, HISTORIES).reshape(len(HISTORIES), -1))


SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:]]


@pytest.mark.parametrize("task", ["next", *SLOW])
def test_onnx(model, tmp_path, task):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    files, _ = export(model, task, tmp_path, ["onnx"])
    session = onnxruntime.InferenceSession(str(files["onnx"]))
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("items", ["batch", "length"])]
    assert [node.name for node in session.get_outputs()] == ["output"]
    check(lambda items: torch.from_numpy(session.run(None, {"items": items.numpy()})[0]), model, task)


def test_what_cannot_be_made_is_left_out_or_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_ONNX_PACKAGES", ("onnx", "no_such_package"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    files, left_out = export(model, "ctr", tmp_path)
    assert list(files) == ["program"]
    assert left_out["package"] == "the format package needs a C++ compiler, g++ or clang++"
    assert "no_such_package: pip install '.[export]' in the sources of pcl_ext" in left_out["onnx"]
    with pytest.raises(ImportError, match="no_such_package"):
        export(model, "ctr", tmp_path, ["onnx"])
    with pytest.raises(ImportError, match="needs a C\\+\\+ compiler"):
        export(model, "ctr", tmp_path, ["package"])


def test_an_export_that_answers_otherwise_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "SEEN_SCORE", -2e9)
    with pytest.raises(ValueError, match="the program of task 'next' does not answer as the run and is not kept"):
        export(model, "next", tmp_path, ["program"])
    assert not list(tmp_path.iterdir())


def test_mistakes(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="formats must be among program, package, onnx, got jit"):
        export(model, "ctr", tmp_path, ["jit"])
    with pytest.raises(ValueError, match="task must be one of"):
        export(model, "churn", tmp_path)
    monkeypatch.setattr(export_module, "_READOUTS", {})
    with pytest.raises(ValueError, match="task 'ctr' reads last, which cannot be exported yet"):
        export(model, "ctr", tmp_path)
    open_model = make_model()
    open_model.add_task(SPECS["ctr"])
    with pytest.raises(ValueError, match="task 'ctr' must be closed to be exported"):
        export(open_model, "ctr", tmp_path)


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from stores import make_model
from pcl_ext.export import export
model = make_model("ctr")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # no file may be larger
try:
    export(model, "ctr", sys.argv[2], ["program"])
except OSError as error:
    print(error)
"""


def test_a_disk_that_refuses_is_an_error(tmp_path):
    """torch's own writer of files would end the process."""
    command = [sys.executable, "-c", FULL, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"File too large: '{tmp_path}'", done.stdout)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_swept(model, tmp_path):
    (tmp_path / ".pcl-0123456789abcdef.tmp").write_text("half")
    export(model, "ctr", tmp_path, ["program"])
    assert {path.name for path in tmp_path.iterdir()} == {"ctr.json", "ctr.program.pt2"}


def test_what_torch_cannot_make_is_an_error_with_a_name(model, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("the compiler failed")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(ValueError, match="the program of task 'ctr' cannot be made: the compiler failed"):
        export(model, "ctr", tmp_path, ["program"])
    assert not list(tmp_path.iterdir())
