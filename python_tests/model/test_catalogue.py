"""The catalogue of an items task: which columns its targets are, and that none of it is saved."""

import warnings
from dataclasses import replace

import pytest
import torch
from model_cases import SPECS, V, add

from pcl_ext import BackboneConfig, MemoryConfig, PackedBatch, TaskSpec, UserModel, task_loss
from pcl_ext.model import Backbone
from pcl_ext.model.catalogue import Catalogue


def test_nothing_of_it_is_saved(model):
    task = add(model, "rank")
    assert task.catalogue.tolist() == list(range(5, 25))
    assert not any("ranked" in name or "column" in name for name in task.state_dict())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_columns_of_targets(dtype):
    catalogue = Catalogue(TaskSpec("some", "items", catalogue=(9, 2, 40)), V)
    assert catalogue.columns(torch.tensor([40, 9, 2, 9], dtype=dtype)).tolist() == [2, 0, 1, 0]
    assert catalogue.columns(torch.tensor([], dtype=dtype)).tolist() == []


EVERYTHING = TaskSpec("all", "items")
NO_ITEMS = [(spec, item) for spec in (SPECS["rank"], EVERYTHING) for item in (-100, -1, 0, V + 1, -V, 2**40)]


@pytest.mark.parametrize(("spec", "item"), [*NO_ITEMS, (SPECS["rank"], 3)], ids=lambda x: getattr(x, "name", x))
def test_what_is_no_item_is_named(spec, item):
    catalogue = Catalogue(spec, V)
    with pytest.raises(ValueError, match=f"targets of task '{spec.name}' must be in its catalogue, got item {item}$"):
        catalogue.columns(torch.tensor([7, item, 8]))


def test_targets_in_a_list_are_refused():
    with pytest.raises(TypeError, match=r"targets of task 'all' must be a Tensor \[m\] of ids, got list"):
        Catalogue(EVERYTHING, V).columns([3, 4])


@pytest.mark.parametrize("part", [(0, None), (1, 2), (2, 9)], ids=str)
@pytest.mark.parametrize("catalogue", [None, (9, 2, 40)], ids=["all", "some"])
def test_rows_of_the_item_table_come_in_column_order(catalogue, part):
    table = torch.randn(V + 1, 3)
    ranked = Catalogue(TaskSpec("rank", "items", catalogue=catalogue), V)
    assert torch.equal(ranked.rows_of(table, *part), table[ranked.items][part[0] : part[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_item_to_learn_that_the_history_holds_is_named(model, dtype):
    task = add(model.to(dtype), "rank")
    batch = PackedBatch.from_lists([[1, 2], [9, 7]], num_items=V, max_len=20)
    output, target, rows = model(batch, "rank"), task.columns(torch.tensor([9, 5, 7])), torch.tensor([0, 1, 1])
    assert task_loss(task.spec, output, target[:2], rows[:2]).isfinite()
    with pytest.raises(ValueError, match=r"'rank', in row 1 .* holds already, as are 1 of 3 targets; .*repeats=True"):
        task_loss(task.spec, output, target, rows)
    assert task_loss(task.spec, output.detach(), target, rows) > 0  # to measure is no mistake
    assert task_loss(replace(task.spec, repeats=True), output, target, rows) > 0


def test_a_mask_of_ones_own_is_no_history():
    output = torch.tensor([[1.0, -torch.inf]], requires_grad=True)
    assert task_loss(EVERYTHING, output, torch.tensor([1]), torch.tensor([0])).isposinf()


@pytest.mark.parametrize("name", ["rank", "click"])
def test_the_loss_under_transforms(name):
    spec, rows = SPECS[name], torch.arange(2)
    output, target = torch.randn(4, 2, 3) if spec.kind == "items" else torch.randn(4, 2), torch.randint(0, 2, (4, 2))
    got = torch.vmap(torch.func.grad(lambda x, y: task_loss(spec, x, y, rows)))(output, target)
    for one, own, grad in zip(output, target, got, strict=True):
        one.requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(task_loss(spec, one, own, rows), one)[0])


@pytest.mark.parametrize("none", [-1, -100])
@pytest.mark.parametrize("kind", ["items", "classes"])
def test_a_column_or_class_that_is_none_makes_the_loss_nan(kind, none):
    """On CUDA nobody looks at the targets, and `cross_entropy` leaves -100 out in silence; nor under vmap, here."""
    spec = TaskSpec("t", kind, num_classes=20 if kind == "classes" else None)
    output, rows = torch.randn(3, 20), torch.arange(3)
    targets = torch.tensor([[4, 19, 0], [4, none, 0]])
    losses = torch.vmap(lambda target: task_loss(spec, output, target, rows))(targets)
    assert losses.isnan().tolist() == [False, True]


BINARY, CLASSES = TaskSpec("flag", "binary"), TaskSpec("age", "classes", num_classes=3)
VALUE = TaskSpec("x", "regression")


@pytest.mark.parametrize(
    ("spec", "target", "error", "words"),
    [
        (BINARY, torch.tensor([0, 2]), ValueError, r"'flag' must be in 0..1, got 0 to 2"),
        (BINARY, torch.tensor([-1.0, 1.0]), ValueError, r"'flag' must be in 0..1, got -1 to 1"),
        (BINARY, torch.tensor([0.0, torch.nan]), ValueError, r"'flag' must be in 0..1"),
        (CLASSES, torch.tensor([0, -100]), ValueError, r"'age' must be in 0..2, got -100 to 0"),
        (CLASSES, torch.tensor([0.0, 1.0]), TypeError, r"'age' must be integers, got torch.float32"),
        (EVERYTHING, torch.tensor([0, 3]), ValueError, r"'all' must be columns of the output, in 0..2, got 0 to 3"),
        (EVERYTHING, torch.tensor([0, -1]), ValueError, r"in 0..2, got -1 to 0; task.columns\(item_ids\) gives them"),
        (EVERYTHING, torch.tensor([0.0, 1.0]), TypeError, r"'all' must be integers, got torch.float32"),
        (
            VALUE,
            torch.tensor([0.0, torch.nan]),
            ValueError,
            r"'x' must be finite, got nan in place 1; leave such rows out",
        ),
        (VALUE, torch.tensor([-torch.inf, 0.0]), ValueError, r"'x' must be finite, got -inf in place 0"),
        (BINARY, [0, 1], TypeError, r"target must be a Tensor \[m\], got list"),
        (BINARY, torch.tensor([[0], [1]]), ValueError, r"must both be \[m\], got \[2, 1\] and \[2\]"),
    ],
)
def test_targets_that_are_none_are_refused(spec, target, error, words):
    output = torch.randn(2) if spec.kind in ("binary", "regression") else torch.randn(2, 3)
    with pytest.raises(error, match=words):
        task_loss(spec, output, target, torch.arange(2))


@pytest.mark.parametrize(
    ("spec", "output", "words"),
    [
        (BINARY, torch.randn(2, 3), r"output of 'flag' \(binary\) must be \[b\], got \[2, 3\]"),
        (VALUE, torch.randn(2, 1), r"output of 'x' \(regression\) must be \[b\], got \[2, 1\]"),
        (CLASSES, torch.randn(2, 4), r"output of 'age' \(classes\) must be \[b, 3\], got \[2, 4\]"),
        (CLASSES, torch.randn(2), r"output of 'age' \(classes\) must be \[b, 3\], got \[2\]"),
        (EVERYTHING, torch.randn(2), r"output of 'all' \(items\) must be \[b, C\], got \[2\]"),
        (BINARY, {"flag": None}, r"must be a Tensor, got dict; of a mixed batch take one task's"),
        ("flag", torch.randn(2), "spec must be a TaskSpec, got str"),
    ],
)
def test_an_output_that_is_not_the_tasks_is_refused(spec, output, words):
    with pytest.raises((TypeError, ValueError), match=words):
        task_loss(spec, output, torch.tensor([0, 1]), torch.arange(2))


def test_a_task_in_place_of_its_spec_is_told_so(model):
    task = model.add_task(SPECS["click"])
    with pytest.raises(TypeError, match="spec must be a TaskSpec, got Task; task.spec is one"):
        task_loss(task, torch.randn(2), torch.ones(2), torch.arange(2))
    with pytest.raises(ValueError, match="catalogue is of items tasks only, task 'click' is binary"):
        task.catalogue  # noqa: B018
    with pytest.raises(TypeError, match=r"output of 'value' must be a Tensor, got dict"):
        model.add_task(SPECS["value"]).loss({}, torch.ones(2), torch.arange(2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_classes_may_have_any_width(dtype):
    output, target = torch.randn(4, 3), torch.tensor([2, 0, 1, 2])
    want = torch.nn.functional.cross_entropy(output, target)
    assert torch.equal(task_loss(CLASSES, output, target.to(dtype), torch.arange(4)), want)


@pytest.mark.parametrize("spec", [BINARY, CLASSES, TaskSpec("all", "items"), TaskSpec("x", "regression")], ids=str)
def test_no_targets_are_no_loss(spec):
    output = torch.randn((2, 3) if spec.kind in ("items", "classes") else (2,), requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    loss = task_loss(spec, output, none, none)
    loss.backward()
    assert loss == 0
    assert not output.grad.any()


@pytest.mark.parametrize("spec", [BINARY, CLASSES], ids=str)
def test_the_loss_compiles_whole(spec):
    output = torch.randn(4, 3) if spec.kind == "classes" else torch.randn(4)
    target, rows = torch.tensor([1, 0, 1, 0]), torch.arange(4)
    compiled = torch.compile(lambda *tensors: task_loss(spec, *tensors), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(output, target, rows), task_loss(spec, output, target, rows))


@pytest.mark.parametrize("columns", [30_000, 70_000])
def test_the_loss_without_a_gradient_is_that_with_one(columns):
    """Many columns are summed in parts: equal to rounding, and of one bit where there are few."""
    output, target, rows = torch.randn(3, columns) * 4, torch.tensor([5, columns - 1, 0]), torch.tensor([0, 2, 2])
    output[1], output[2, 0] = -1e9, 80.0
    spec = TaskSpec("all", "items")
    want = (output.double().logsumexp(1)[rows] - output.double()[rows, target]).mean()
    learned = task_loss(spec, output.clone().requires_grad_(), target, rows)
    measured = task_loss(spec, output, target, rows)
    torch.testing.assert_close(measured.double(), want, rtol=1e-6, atol=0)
    if columns < 32_768:
        assert torch.equal(measured, learned.detach())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_and_their_rows_may_be_of_any_integer_dtype(dtype):
    output, target, rows = torch.randn(3, 20), torch.tensor([4, 19, 0]), torch.tensor([0, 2, 2])
    want = task_loss(SPECS["rank"], output, target, rows)
    assert torch.equal(task_loss(SPECS["rank"], output, target.to(dtype), rows.to(dtype)), want)


@pytest.mark.parametrize("rows", [[0, 3], [-1, 0]])
def test_rows_that_the_output_does_not_have_are_refused(rows):
    with pytest.raises(ValueError, match=r"target_row must be in 0\.\.2, the rows of the output"):
        task_loss(SPECS["rank"], torch.randn(3, 20), torch.tensor([4, 0]), torch.tensor(rows))


def test_a_frozen_backbone_that_nobody_marked_warns_of_an_items_task():
    spec, made = TaskSpec("buy", "items"), UserModel(Backbone(BackboneConfig(num_items=9, dim=8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.add_task(spec)  # what pretraining does
        made.remove_task("buy")
        made.freeze_backbone()
        made.add_task(spec, MemoryConfig(tied=False))
        made.add_task(TaskSpec("click", "binary"))
        made.remove_task("buy")
    with pytest.warns(UserWarning, match="'buy'.*none of the frozen backbone's items is marked"):
        made.add_task(spec)
    made.remove_task("buy")
    made.backbone.trained_items[1:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.add_task(spec).tied
