"""Metrics against float64 brute force and torchmetrics; ties, filtered items, batches, hostile input."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcl_ext.metrics import METRICS, TaskMetrics, higher_is_better
from pcl_ext.task import TaskSpec

ITEMS = TaskSpec("shop", "items")
SPECS = {
    "items": ITEMS,
    "binary": TaskSpec("ctr", "binary"),
    "classes": TaskSpec("age", "classes", num_classes=4),
    "regression": TaskSpec("spend", "regression"),
}


def brute_force(scores, target, rows):
    """Mean over the targets of the mean gain over all ranks that random tie-breaking may give."""
    total = dict.fromkeys(METRICS["items"], 0.0)
    for column, row in zip(target.tolist(), rows.tolist(), strict=True):
        line = scores[row].tolist()
        own = scores[row, column].item()
        above, equal = sum(s > own for s in line), sum(s == own for s in line)
        ranks = range(above + 1, above + equal + 1)
        total["mrr@5"] += sum(1 / r for r in ranks if r <= 5) / equal
        total["ndcg@10"] += sum(1 / math.log2(r + 1) for r in ranks if r <= 10) / equal
        total["hr@10"] += sum(r <= 10 for r in ranks) / equal
    return {name: value / len(target) for name, value in total.items()}


def measure(spec, output, target, rows=None):
    metrics = TaskMetrics(spec)
    metrics.update(output, target, torch.arange(len(target)) if rows is None else rows)
    return metrics


def example(kind, count, seed=0):
    """output, target of `count` rows; coarse values, so that ties happen."""
    g = torch.Generator().manual_seed(seed)
    width = {"items": 37, "binary": 1, "classes": 4, "regression": 1}[kind]
    output = torch.randn(count, width, generator=g).mul(3).round().div(3)
    if kind == "regression":
        return output[:, 0], torch.randn(count, generator=g)
    return output if width > 1 else output[:, 0], torch.randint(max(width, 2), (count,), generator=g)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_items_equal_brute_force(data):
    rows_of = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))  # targets of each row
    width = data.draw(st.sampled_from([1, 2, 8, 9, 40, 2041, 4104]))
    levels = data.draw(st.sampled_from([1, 3, 100000]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randint(levels, (len(rows_of), width), generator=g).float()
    rows = torch.arange(len(rows_of)).repeat_interleave(torch.tensor(rows_of))
    if not len(rows):
        return
    target = torch.randint(width, (len(rows),), generator=g)
    got = measure(ITEMS, scores, target, rows).compute()
    assert got == pytest.approx(brute_force(scores, target, rows), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("layout", ["row", "column", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_items_of_any_dtype_and_layout(dtype, layout):
    scores = torch.randn(300, 2100).to(dtype)
    target = torch.randint(2100, (300,))
    want = brute_force(scores, target, torch.arange(300))
    if layout == "column":
        scores = scores.t().contiguous().t()
    if layout == "sliced":
        scores = torch.cat([scores.new_full((300, 3), torch.nan), scores], 1)[:, 3:]
    assert measure(ITEMS, scores, target).compute() == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("num_items", [3, 10, 11, 2048, 46000])
def test_a_constant_model_gets_k_over_n_exactly(num_items):
    got = measure(ITEMS, torch.zeros(7, num_items), torch.randint(num_items, (7,))).compute()
    assert got["hr@10"] == min(10 / num_items, 1)
    assert got["mrr@5"] == pytest.approx(sum(1 / r for r in range(1, min(5, num_items) + 1)) / num_items, rel=1e-14)


def test_a_constant_model_is_a_coin_everywhere():
    label = torch.tensor([0, 1, 1, 0, 1])
    binary = measure(SPECS["binary"], torch.zeros(5), label).compute()
    assert binary == {"auc": 0.5, "log_loss": pytest.approx(math.log(2)), "accuracy": 0.5}
    classes = measure(SPECS["classes"], torch.ones(8, 4), torch.arange(8) % 4).compute()
    assert classes == {"accuracy": 0.25, "macro_f1": 0.25}


@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_the_batch_size_and_order_change_no_bit(kind, batch):
    output, target = example(kind, 1000)
    whole = measure(SPECS[kind], output, target)
    parts = TaskMetrics(SPECS[kind])
    for index in reversed(torch.arange(1000).split(batch)):
        index = index.flip(0)
        parts.update(output[index], target[index], torch.arange(len(index)))
    assert parts.count == 1000
    assert parts.compute() == whole.compute()
    assert parts.standard_error() == whole.standard_error()


@pytest.mark.parametrize("kind", ["binary", "classes"])
@pytest.mark.parametrize("seed", range(3))
def test_labels_equal_torchmetrics_without_ties(kind, seed):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(500, 4 if kind == "classes" else 1, generator=g)
    target = torch.randint(4 if kind == "classes" else 2, (500,), generator=g)
    got = measure(SPECS[kind], logits, target).compute()
    if kind == "binary":
        want = {"auc": functional.binary_auroc(logits[:, 0], target)}
        want["log_loss"] = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target.float())
        want["accuracy"] = functional.binary_accuracy(logits[:, 0], target)
    else:
        want = {"accuracy": functional.multiclass_accuracy(logits, target, 4, average="micro")}
        want["macro_f1"] = functional.multiclass_f1_score(logits, target, 4, average="macro")
    assert got == pytest.approx({name: float(value) for name, value in want.items()}, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 30.0, -1e4])
def test_auc_counts_pairs(shift):
    logit, label = example("binary", 300)
    logit = logit + shift
    pairs = (logit[label == 1][:, None] - logit[label == 0][None]).sign().double()
    got = measure(SPECS["binary"], logit, label).compute()
    assert got["auc"] == pytest.approx(float((pairs + 1).mean() / 2), abs=1e-6)


@pytest.mark.parametrize("logit", [-800.0, -40.0, 0.0, 40.0, 800.0, 1e30])
def test_log_loss_of_extreme_logits(logit):
    got = measure(SPECS["binary"], torch.tensor([logit, logit], dtype=torch.float64), torch.tensor([0, 1])).compute()
    want = [
        logit if logit > 36 else math.log1p(math.exp(logit)),
        -logit if logit < -36 else math.log1p(math.exp(-logit)),
    ]
    assert got["log_loss"] == pytest.approx(sum(want) / 2, rel=1e-14)


def test_a_class_never_seen_nor_predicted_is_left_out_of_macro_f1():
    logits = torch.eye(4)[torch.tensor([0, 1, 1, 0])]
    assert measure(SPECS["classes"], logits, torch.tensor([0, 1, 1, 1])).compute()["macro_f1"] == pytest.approx(
        (2 / 3 + 4 / 5) / 2
    )


def test_many_classes_cost_no_square_of_them():
    count = 200_000
    logits = torch.zeros(4, count)
    logits[torch.arange(4), torch.tensor([7, 7, 9, 199_999])] = 1.0
    metrics = TaskMetrics(TaskSpec("city", "classes", num_classes=count))
    for rows in ([0, 1], [2, 3]):
        metrics.update(logits[rows], torch.tensor([7, 8, 9, 199_999])[rows], torch.arange(2))
    assert metrics.compute() == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 0 + 1 + 1) / 4)}
    assert metrics.standard_error()["accuracy"] == pytest.approx(0.25)


def test_regression():
    got = measure(SPECS["regression"], torch.tensor([[1.0], [2.0]]), torch.tensor([4.0, 2.0]))
    assert got.compute() == {"rmse": math.sqrt(4.5), "mae": 1.5}
    assert got.standard_error()["mae"] == pytest.approx(1.5)


@pytest.mark.parametrize("kind", list(SPECS))
def test_standard_errors_equal_the_bootstrap(kind):
    output, target = example(kind, 400)
    if kind == "classes":
        target = torch.where(torch.rand(400) < 0.5, output.argmax(1), target)
    if kind == "items":
        output[torch.arange(400), target] += 2
    errors = measure(SPECS[kind], output, target).standard_error()
    draws = []
    for _ in range(300):
        pick = torch.randint(400, (400,))
        draws.append(measure(SPECS[kind], output[pick], target[pick]).compute())
    for name, error in errors.items():
        spread = torch.tensor([draw[name] for draw in draws]).std().item()
        assert error == pytest.approx(spread, rel=0.2), name


def test_the_error_of_macro_f1_is_the_delta_method_exactly():
    """Gradient of macro-F1 by the share of each (target, predicted) cell, one class never predicted."""
    target, predicted = torch.randint(4, (90,)), torch.randint(3, (90,))
    predicted = torch.where(torch.rand(90) < 0.4, predicted, target.clamp_max(2))
    cells = torch.zeros(4, 4, dtype=torch.float64).index_put_((target, predicted), torch.tensor(1.0).double(), True)
    share = (cells / 90).requires_grad_()
    f1 = (2 * share.diagonal() / (share.sum(0) + share.sum(1))).mean()
    (gradient,) = torch.autograd.grad(f1, share)
    variance = (share * gradient.square()).sum() - (share * gradient).sum().square()
    got = measure(SPECS["classes"], torch.eye(4)[predicted], target)
    assert got.compute()["macro_f1"] == pytest.approx(f1.item(), rel=1e-12)
    assert got.standard_error()["macro_f1"] == pytest.approx((variance / 89).sqrt().item(), rel=1e-12)


def test_the_error_of_accuracy_counts_a_tie_by_its_share():
    logits = torch.tensor([[2, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 3, 3, 0], [0, 0, 0, 4]]).float()
    got = measure(SPECS["classes"], logits, torch.tensor([0, 1, 2, 3, 0, 1]))
    share = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4, 0, 0], dtype=torch.float64)
    assert got.compute()["accuracy"] == pytest.approx(share.mean().item())
    assert got.standard_error()["accuracy"] == pytest.approx(share.std().item() / 6**0.5)


def test_the_error_of_auc_counts_ties_as_half():
    logit, label = example("binary", 60)
    pairs = (logit[label == 1][:, None] - logit[label == 0]).sign().double().add(1).div(2)
    assert (pairs == 0.5).any()
    variance = sum(pairs.mean(side).var() / len(pairs.mean(side)) for side in (0, 1))
    assert measure(SPECS["binary"], logit, label).standard_error()["auc"] == pytest.approx(variance.sqrt().item())


def test_a_perfect_regression_has_no_error_and_one_row_says_nothing():
    value = torch.tensor([1.0, 2.0, 5.0])
    assert measure(SPECS["regression"], value, value).standard_error() == {"rmse": 0.0, "mae": 0.0}
    assert measure(SPECS["regression"], value[:1], value[:1]).standard_error() == {}


def test_few_targets_have_the_error_of_a_mean():
    metrics = measure(ITEMS, torch.randn(5, 8), torch.arange(5))
    for name, error in metrics.standard_error().items():
        assert error == pytest.approx(metrics.values(name).std().item() / 5**0.5, rel=1e-12)


def test_rows_without_targets_count_as_rows_of_their_batch():
    """Targets of rows 2, 4 and, twice, 5; row 2 of one batch and row 2 of the next are two clusters."""
    scores, target, rows = torch.randn(6, 40), torch.tensor([3, 8, 20, 31]), torch.tensor([2, 4, 5, 5])
    whole, parts = measure(ITEMS, scores, target, rows), measure(ITEMS, scores[:3], target[:1], rows[:1])
    parts.update(scores[3:], target[1:], rows[1:] - 3)
    assert parts.standard_error() == whole.standard_error()
    scores[5] = torch.nan
    with pytest.raises(ValueError, match=r"row 2 of the batch \(row 8 in all\)"):
        parts.update(scores[3:], target[1:], rows[1:] - 3)


def test_a_rank_that_is_not_shared_has_its_gain_to_the_last_bit():
    metrics = measure(ITEMS, torch.arange(12.0).flip(0).repeat(12, 1), torch.arange(12))
    rank = torch.arange(1, 13, dtype=torch.float64)
    assert torch.equal(metrics.values("mrr@5"), torch.where(rank <= 5, 1 / rank, 0.0))
    assert torch.equal(metrics.values("ndcg@10"), torch.where(rank <= 10, 1 / torch.log2(rank + 1), 0.0))


def test_bfloat16_scores_that_half_precision_cannot_hold_are_ranked():
    scores = torch.full((1, 2000), 1e6, dtype=torch.bfloat16)
    scores[0, 7] = 2e6
    assert measure(ITEMS, scores, torch.tensor([7])).compute()["mrr@5"] == 1


def test_targets_of_one_row_are_one_cluster():
    scores = torch.randn(50, 40)
    target = torch.randint(40, (50,))
    once = measure(ITEMS, scores, target).standard_error()
    twice = measure(ITEMS, scores, target.repeat(2), torch.arange(50).repeat(2)).standard_error()
    assert twice == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize("kind", list(SPECS))
def test_one_row_has_no_standard_error(kind):
    output, target = example(kind, 1)
    assert measure(SPECS[kind], output, target).standard_error() == {}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", list(SPECS))
def test_a_score_that_is_not_finite_raises_with_task_and_row(kind, bad):
    output, target = example(kind, 8)
    metrics = measure(SPECS[kind], output, target)
    output[5] = bad
    with pytest.raises(ValueError, match=rf"{SPECS[kind].name}.*row 5 of the batch \(row 13 in all\)"):
        metrics.update(output, target, torch.arange(8))


def test_large_finite_scores_pass():
    scores = torch.full((2, 9), 3e38)
    assert measure(ITEMS, scores, torch.tensor([0, 1])).compute()["hr@10"] == 1


LONG = torch.int64
REFUSED = [
    ("items", torch.zeros(2, 5), [0, 5], [0, 1], "target of task 'shop' must be in 0..4, got 0..5"),
    ("items", torch.zeros(2, 5), [0, -1], [0, 1], "must be in 0..4"),
    ("items", torch.zeros(2, 5), [0, 1], [0, 2], "target_row of task 'shop' must be in 0..1"),
    ("items", torch.zeros(2, 5), [0, 1], [0], "must be .m. both"),
    ("items", torch.zeros(5), [0], [0], "2 dimensions"),
    ("binary", torch.zeros(2), [0, 2], [0, 1], "must be in 0..1"),
    ("binary", torch.zeros(2, 2), [0, 1], [0, 1], "1 dimensions"),
    ("classes", torch.zeros(2, 3), [0, 1], [0, 1], "must have 4 columns, got 3"),
]


@pytest.mark.parametrize(("kind", "output", "target", "rows", "message"), REFUSED)
def test_refuses(kind, output, target, rows, message):
    with pytest.raises(ValueError, match=message):
        measure(SPECS[kind], output, torch.tensor(target), torch.tensor(rows))


def test_refuses_wrong_types():
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        measure(ITEMS, torch.zeros(1, 5, dtype=LONG), torch.tensor([0]))
    with pytest.raises(TypeError, match="must be integers, got torch.float32"):
        measure(ITEMS, torch.zeros(1, 5), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="must be finite, got nan"):
        measure(SPECS["regression"], torch.zeros(1), torch.tensor([math.nan]))
    with pytest.raises(TypeError, match="output of task 'ctr' must be a Tensor, got dict"):
        measure(SPECS["binary"], {"ctr": (torch.arange(1), torch.zeros(1))}, torch.tensor([0]))
    with pytest.raises(TypeError, match="target of task 'ctr' must be a Tensor, got list"):
        measure(SPECS["binary"], torch.zeros(1), [0])


def test_refuses_another_width_than_that_of_its_catalogue():
    with pytest.raises(ValueError, match="must have 2 columns, got 5"):
        measure(TaskSpec("range", "items", catalogue=(3, 7)), torch.zeros(1, 5), torch.tensor([0]))


def test_refuses_a_catalogue_that_changes_its_width():
    metrics = measure(ITEMS, torch.zeros(1, 5), torch.tensor([0]))
    with pytest.raises(ValueError, match="must have 5 columns, got 6"):
        metrics.update(torch.zeros(1, 6), torch.tensor([0]), torch.tensor([0]))


def test_undefined_metrics_raise():
    with pytest.raises(ValueError, match="'shop' need at least one target"):
        TaskMetrics(ITEMS).compute()
    with pytest.raises(ValueError, match="'ctr' needs targets of both classes, got 3 targets of 1"):
        measure(SPECS["binary"], torch.randn(3), torch.ones(3, dtype=LONG)).compute()


def test_auc_of_a_single_class_is_left_out_where_the_task_has_another_metric():
    spec = TaskSpec("ctr", "binary", metric="log_loss")
    metrics = measure(spec, torch.zeros(3), torch.ones(3, dtype=LONG))
    assert metrics.compute() == {"log_loss": pytest.approx(math.log(2)), "accuracy": 0.5}
    assert set(metrics.standard_error()) == {"log_loss", "accuracy"}


def test_a_batch_without_targets_adds_nothing():
    metrics = measure(ITEMS, torch.randn(4, 5), torch.tensor([0, 1, 2, 3]))
    before = metrics.compute()
    metrics.update(torch.randn(3, 5), torch.tensor([], dtype=LONG), torch.tensor([], dtype=LONG))
    assert metrics.compute() == before
    assert metrics.count == 4


@pytest.mark.parametrize("metric", sorted({name for names in METRICS.values() for name in names}))
def test_higher_is_better(metric):
    assert higher_is_better(metric) == (metric not in ("log_loss", "rmse", "mae"))


def test_an_unknown_metric_raises():
    with pytest.raises(ValueError, match="got 'mrr'"):
        higher_is_better("mrr")


def test_without_torchmetrics_auc_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[cli\]' in the sources of pcl_ext"):
        measure(SPECS["binary"], torch.randn(4), torch.tensor([0, 1, 0, 1])).compute()
