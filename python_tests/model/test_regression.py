"""A regression learns the same whatever unit its targets are given in."""

import pytest
import torch
from model_cases import SPECS, add, histories, pack

from pcl_ext import task_loss

LENGTHS = [5, 0, 1, 12, 9, 3, 7, 2]
TARGETS = torch.tensor([0.5, -2.0, 0.0, 1.5, 3.0, -1.0, 0.25, 1.0])


def learn(model, unit, center, steps=30):
    """Outputs before and after some steps of Adam, and the losses, for targets in this unit."""
    torch.manual_seed(0)
    task = add(model, "value", "tail", members=2, item_dropout=0.0)
    batch, target, rows = pack(histories(LENGTHS)), (TARGETS + center) * unit, torch.arange(len(LENGTHS))
    task.fit_head(model.encode(batch, ["value"])["value"].detach(), target)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    outputs, losses = [model(batch, "value").detach()], []
    for _ in range(steps):
        parts = model.member_outputs(batch, "value")
        loss = sum(task.loss(output, target, rows) for output in parts) / len(parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [output / unit - center for output in (*outputs, model(batch, "value").detach())], losses


@pytest.mark.parametrize(("unit", "center"), [(1e-6, 0.0), (1e6, 0.0), (1e-3, 5.0)])
def test_the_unit_does_not_matter(model, unit, center):
    (_, want), want_losses = learn(model, 1.0, 0.0)
    assert want_losses[-1] < 0.5 * want_losses[0]
    model.remove_task("value")
    (_, got), losses = learn(model, unit, center)
    torch.testing.assert_close(losses, want_losses, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_the_loss_is_in_units_of_the_deviation(model):
    task, rows = add(model, "value"), torch.arange(len(TARGETS))
    task.head.fit("regression", TARGETS * 40)
    output = TARGETS * 40 + TARGETS.std(correction=0) * 40
    assert float(task.loss(output, TARGETS * 40, rows)) == pytest.approx(1.0)
    assert float(task_loss(SPECS["value"], output, TARGETS * 40, rows)) == pytest.approx(float(task.head.unit[1]) ** 2)


@pytest.mark.parametrize("name", ["rank", "click", "age"])
def test_other_kinds_have_no_unit(model, name):
    task, rows = add(model, name), torch.tensor([0, 1, 1])
    output, target = model(pack(histories()), name), torch.tensor([1, 0, 1])
    assert torch.equal(task.loss(output, target, rows), task_loss(SPECS[name], output, target, rows))


def test_a_constant_target_is_its_own_answer(model):
    task = add(model, "value")
    task.head.fit("regression", torch.full((7,), 0.1))
    assert task.head.unit.tolist() == [pytest.approx(0.1), 1.0]
