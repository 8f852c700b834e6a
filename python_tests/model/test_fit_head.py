"""A task starts at the base rates of its training data, whatever numbers these come as."""

import pytest
import torch
from model_cases import SPECS, histories, pack

from pcl_ext import MemoryConfig

TARGETS = {
    "rank": torch.tensor([5, 7, 7, 24, 5, 5]),
    "click": torch.tensor([1, 0, 1, 1, 0, 1]),
    "age": torch.tensor([0, 2, 2, 1, 2, 2]),
    "value": torch.tensor([3, 0, 10, 4, 4, 7]),
}
DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


def fit(model, name, target, rows=6):
    task = model.add_task(SPECS[name], MemoryConfig(prompt_len=3, members=2)).eval()
    with torch.no_grad():
        features = model.encode(pack(histories()), [name])[name][:rows]
    task.fit_head(features, task.columns(target))
    return task


def test_a_binary_task_starts_at_its_base_rate(model):
    task = fit(model, "click", TARGETS["click"].float())
    for part in (task, *task.others):
        torch.testing.assert_close(part.head.linear.bias, torch.tensor([5 / 3]).log())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_the_base_rate_of_soft_targets_is_their_mean(model, share):
    task = fit(model, "click", torch.full((30,), share))
    want = torch.tensor([(30 * share + 1) / (30 * (1 - share) + 1)]).log()
    torch.testing.assert_close(task.head.linear.bias, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_targets_may_be_of_any_integer_dtype(model, name, dtype):
    want = fit(model, name, TARGETS[name]).state_dict()
    columns = model.task(name).columns(TARGETS[name])
    model.remove_task(name)
    torch.manual_seed(0)
    task = fit(model, name, TARGETS[name].to(dtype))
    head = {key: value for key, value in task.head.state_dict().items() if "weight" not in key and key != "rows"}
    assert all(torch.equal(value, want[f"head.{key}"]) for key, value in head.items())
    assert torch.equal(task.columns(TARGETS[name].to(dtype)).long(), columns)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("click", [], "task 'click' must be fitted to at least one history and one target, got 6 and 0"),
        ("value", [], "task 'value' must be fitted to at least one history and one target, got 6 and 0"),
        ("value", [1.0, float("nan")], "targets of task 'value' must be finite"),
        ("value", [1.0, float("inf")], "targets of task 'value' must be finite"),
        ("click", [0.0, float("nan")], "targets of task 'click' must be finite"),
        ("click", [0.0, 2.0], r"targets of task 'click' must be in 0\.\.1, got 0 to 2"),
        ("age", [0, 3], r"targets of task 'age' must be in 0\.\.2, got 0 to 3"),
        ("click", [[0.0], [1.0]], r"targets of task 'click' must be \[n\], got \[2, 1\]"),
        ("value", [0.0, 1e-50], r"that torch.float32 holds, got 5e-51 and 5e-51; give them in another unit"),
        ("value", [0.0, 1e40], r"a mean and a deviation that torch.float32 holds, got 5e\+39 and 5e\+39"),
    ],
)
def test_targets_that_say_nothing_are_refused(model, name, target, message):
    target = torch.tensor(target, dtype=torch.float64 if name == "value" else None)
    with pytest.raises(ValueError, match=message):
        fit(model, name, target)
    assert not model.task(name).shift.any()


@pytest.mark.parametrize(
    ("features", "target", "error", "message"),
    [
        (torch.ones(6, 7), TARGETS["click"], ValueError, r"features of task 'click' must be \[n, 81\], got \[6, 7\]"),
        ([[1.0]], TARGETS["click"], TypeError, "features of task 'click' must be a Tensor, got list"),
        (torch.ones(6, 81), [1, 0], TypeError, "targets of task 'click' must be a Tensor, got list"),
        (torch.ones(6, 81), torch.tensor(1.0), ValueError, r"targets of task 'click' must be \[n\], got \[\]"),
    ],
)
def test_what_does_not_fit_the_head_is_named(model, features, target, error, message):
    task = model.add_task(SPECS["click"])
    with pytest.raises(error, match=message):
        task.fit_head(features, target)


def test_columns_that_the_head_does_not_have_are_refused(model):
    task = model.add_task(SPECS["rank"], MemoryConfig(tied=True, readout=("last",)))
    with pytest.raises(ValueError, match=r"targets of task 'rank' must be in 0\.\.19, got 5 to 24"):
        task.fit_head(torch.ones(6, 16), TARGETS["rank"])  # ids, not columns


def test_no_history_at_all_is_refused(model):
    with pytest.raises(ValueError, match="at least one history and one target, got 0 and 6"):
        fit(model, "age", TARGETS["age"], rows=0)


def test_items_that_are_no_integers_are_refused(model):
    with pytest.raises(TypeError, match="targets of task 'rank' must be item ids, integers, got torch.float32"):
        fit(model, "rank", TARGETS["rank"].float())
