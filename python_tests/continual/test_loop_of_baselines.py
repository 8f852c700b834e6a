"""The one loop of all baselines: when it ends, what it keeps, and that it does what `learn_task` does."""

from dataclasses import replace

import pytest
import torch

from benchmarks.continual.loop import Run, train
from pcl_ext.train import learn_task


@pytest.mark.parametrize(("name", "most"), [("segment", None), ("range", None), ("segment", 20)])
def test_baselines_have_the_steps_losses_and_epochs_of_learn_task(name, most, learner, monkeypatch):
    """With the same memory the same weights come out, also where few histories are scored together."""
    if most is not None:
        monkeypatch.setattr("benchmarks.continual.learner.MOST_SCORES", most)
        monkeypatch.setattr("pcl_ext.infer.MOST_SCORES", most)
    made, plain = learner("probe", readout="pcl"), learner("probe", readout="pcl")
    made.learn(name)
    learn_task(plain.model, plain.world.dataset, name, plain.world.learn_config(), plain.memory(name))
    want = plain.model.task(name).state_dict()
    for key, got in made.model.task(name).state_dict().items():
        torch.testing.assert_close(got, want[key], msg=key)


def test_training_ends_after_so_many_epochs_without_a_better_one(learner):
    weight, scores, seen = torch.nn.Parameter(torch.zeros(1)), iter([1.0, 2.0, 2.0, 1.0, 3.0]), []
    run = Run(lambda epoch: (1, [epoch]), lambda epoch: seen.append(epoch) or weight.sum(), lambda: next(scores), 5, 2)
    train(learner("fine"), torch.optim.SGD([weight], 0.1), run)
    assert seen == [0, 1, 2, 3]
    scores, seen[:] = iter([1.0, 2.0, 2.0, 1.0, 3.0]), []
    train(learner("fine"), torch.optim.SGD([weight], 0.1), replace(run, least_epochs=5))
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "cold"), [("segment", True), ("range", False), ("range", True)])
def test_tasks_are_taught_for_half_of_the_epochs_at_least_but_after_a_regression(learner, monkeypatch, name, cold):
    runs, made = [], learner("fine")
    monkeypatch.setattr("benchmarks.continual.learner.train", lambda learner, optimizer, run: runs.append(run))
    made.model.backbone.trained_items[1:] = not cold
    made.learn(name)
    (run,) = runs
    regression = name == "range" and cold
    assert run.least_epochs == (0 if regression else -(-run.epochs // 2))
    assert (run.start is not None) == regression


@pytest.mark.parametrize(("method", "kept"), [("single", 2.0), ("fine", 5 / 3)])
def test_weights_are_averaged_over_epochs_but_from_scratch(method, kept, learner):
    weight, scores = torch.nn.Parameter(torch.zeros(1)), iter(range(2))

    def loss(epoch):
        with torch.no_grad():
            weight.fill_(epoch + 1)
        return 0 * weight.sum()

    run = Run(lambda epoch: (1, [epoch]), loss, lambda: next(scores), epochs=2, patience=2)
    train(learner(method), torch.optim.SGD([weight], 0.1), run)
    assert weight.item() == pytest.approx(kept)
