"""Joint training: every task in a step, each task at its own best epoch."""

from dataclasses import replace

import pytest
import torch

from benchmarks.continual.methods import LEARNERS
from benchmarks.continual.methods.joint import EXPERTS, Experts
from benchmarks.continual.union import Union
from pcl_ext.data import make_batch
from pcl_ext.train import LearnConfig, PretrainConfig, adamw, epoch_batches


@pytest.mark.parametrize("method", ["mtl", "mtl-scratch", "mmoe", "mmoe-scratch"])
def test_joint_training_has_every_task_in_a_step(method, learner):
    made = learner(method)
    for name in made.world.tasks:
        made.start_task(name)
    made.union = Union(made.world.dataset, {n: made.world.train_examples(n) for n in made.world.tasks})
    made.next_batches, made.next_loss = made.next_problem(PretrainConfig())
    _, batches = made.batches(0)
    made.joint_loss(next(iter(batches))).backward()
    for name in ("next", *made.world.tasks):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.model.task(name).head.parameters()), name
    assert made.model.backbone.layers[0].qkv.weight.grad.abs().sum() > 0


def test_the_weight_of_the_later_tasks_scales_what_they_ask_of_the_backbone(learner):
    made, grads = learner("mtl-scratch"), {}
    for name in made.world.tasks:
        made.start_task(name)
    made.union = Union(made.world.dataset, {n: made.world.train_examples(n) for n in made.world.tasks})
    made.next_batches, made.next_loss = made.next_problem(PretrainConfig())
    batch = next(iter(made.batches(0)[1]))
    for task in made.model.tasks.values():
        for parameter in task.head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # at zero they ask nothing of the backbone
    made.eval()
    for strength in (0.0, 0.1, 1.0):
        made.zero_grad()
        made.world = replace(made.world, setting=replace(made.world.setting, strength=strength))
        made.joint_loss(batch).backward()
        grads[strength] = made.model.backbone.layers[0].qkv.weight.grad.clone()
    assert grads[0.0].abs().sum() > 0
    later = grads[1.0] - grads[0.0]
    assert later.abs().sum() > 0
    torch.testing.assert_close(grads[0.1], grads[0.0] + 0.1 * later, rtol=1e-4, atol=1e-6)


def test_memories_move_alike_whatever_the_weight_of_the_later_tasks(learner):
    """Adam compares the gradients of an item memory with an eps that is not small beside them."""
    moved = {}
    for strength in (0.1, 1.0):
        made = learner("mtl-scratch", strength=strength)
        torch.manual_seed(0)
        task = made.start_task("segment")
        torch.nn.init.normal_(task.head.linear.weight, std=0.1)  # at zero the memory has no gradient
        made.union = Union(made.world.dataset, {"segment": made.world.train_examples("segment")})
        made.next_batches, made.next_loss = made.next_problem(PretrainConfig())
        made.eval()
        optimizer, table = adamw(made.task_groups(task, 1.0), made.world.learn_config(), 1000), task.item_tables()[0]
        before = table.detach().clone()
        made.joint_loss(next(iter(made.batches(0)[1]))).backward()
        optimizer.step()
        moved[strength] = table.detach() - before
    assert moved[1.0].abs().max() > 0
    torch.testing.assert_close(moved[0.1], moved[1.0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["mtl", "mmoe"])
def test_joint_training_reads_shared_states_as_each_task_alone_would(method, learner):
    made = learner(method)
    for name in made.world.tasks:
        made.start_task(name)
        made.fit_head(name)
    if method == "mmoe":
        torch.nn.init.normal_(made.experts.up, std=0.1)
    made.eval()
    examples, max_len = made.world.train_examples("segment"), made.model.backbone.config.max_len
    batch = make_batch(made.world.dataset, examples, torch.arange(16), max_len)
    states = made.states(batch.history)
    for name in ("segment", "next"):  # both read the same states
        made.own(name, states).mean(-1)
        shared = made.model.task(name)(made.own(name, states), made.model.backbone.table)
        torch.testing.assert_close(shared, made.output(batch.history, name))


@pytest.mark.parametrize("method", ["mtl", "mmoe"])
def test_joint_training_keeps_the_best_epoch_of_each_task(method, learner):
    made, seen, score = learner(method), [], LEARNERS[method].valid_score

    def watched(name):
        forced = {"segment": -len(seen), "range": len(seen), "next": len(seen)}[name]  # segment: the first epoch
        seen.append((name, score(made, name)))
        return forced

    made.valid_score = watched
    made.learn_all()
    del made.valid_score
    kept = {"segment": 0, "range": -1, "next": -1}
    for name, epoch in kept.items():
        assert made.valid_score(name) == [value for n, value in seen if n == name][epoch], name
    assert not torch.equal(made.views["segment"].table, made.views["range"].table)
    assert made.parameters_of("segment") > made.parameters_of("next")


def test_joint_training_keeps_the_start_of_no_task_that_starts_untrained(learner):
    made, scored = learner("mtl"), []
    made.valid_score = lambda name: scored.append(name) or 0.0  # no epoch beats the start
    made.learn_all()
    cold = [name for name in made.world.tasks if made.model.task(name).cold]
    assert cold
    first = scored.index("segment")  # the first epoch scores all, "next" before it
    assert sorted(set(scored[: first - 1])) == ["next", *cold]


@pytest.mark.parametrize("method", ["mtl", "mtl-scratch"])
def test_a_pretrained_t1_that_no_epoch_betters_stays_as_it_was(method, learner, outputs):
    made = learner(method)
    before = outputs(made, "next")
    made.valid_score = lambda name: 0.0  # no epoch beats the start
    made.learn_all()
    assert torch.equal(outputs(made, "next"), before) == (method == "mtl")


def test_an_epoch_of_joint_training_is_no_longer_than_one_of_a_task(learner):
    made = learner("mtl")
    union = Union(made.world.dataset, {n: made.world.train_examples(n) for n in made.world.tasks})
    whole, _ = union.batches(LearnConfig(batch_tokens=100), 20, 0)
    capped, batches = union.batches(LearnConfig(batch_tokens=100, epoch_tokens=300), 20, 0)
    assert (capped, len(list(batches))) == (3, 3)
    assert whole > 3


def test_an_epoch_of_joint_training_has_the_steps_of_learn_task(learner):
    """Where labels are few, smaller and more ones."""
    dataset, config = learner("mtl").world.dataset, LearnConfig()
    examples = dataset.examples("segment", "train")
    steps, batches = Union(dataset, {"segment": examples}).batches(config, 20, 0)
    alone, own = epoch_batches(dataset, examples, config, 20, 0, 0)
    assert steps == alone > 1
    assert [batch.history.items.numel() for batch in batches] == [batch.history.items.numel() for batch in own]


def test_mmoe_mixes_its_experts_row_by_row():
    experts = Experts(4)
    experts.gates["t"] = torch.nn.Linear(4, EXPERTS)
    torch.nn.init.normal_(experts.up)
    x = torch.randn(3, 4)
    weights = experts.gates["t"](x).softmax(1)
    parts = [torch.nn.functional.gelu(experts.down(x)[:, 4 * e : 4 * e + 4]) @ experts.up[e] for e in range(EXPERTS)]
    want = x + sum(weights[:, e, None] * part for e, part in enumerate(parts))
    torch.testing.assert_close(experts(x, "t"), want)


def test_mmoe_starts_as_the_shared_bottom(learner, outputs):
    plain, mixed = learner("mtl"), learner("mmoe")
    assert torch.equal(outputs(plain, "next"), outputs(mixed, "next"))
