"""The property that defines each method."""

import copy
from types import SimpleNamespace

import pytest
import torch
from learners import one_batch

from benchmarks.continual.learner import World, batches_of, trainable_copy
from benchmarks.continual.methods import LEARNERS, ewc
from benchmarks.continual.methods.lwf import distillation
from benchmarks.continual.methods.piggyback import Binary
from pcl_ext.data import make_batch
from pcl_ext.task import TaskSpec
from pcl_ext.train import learn_task

FROZEN = ["probe", "pooled-probe", "piggyback", "peterrec", "l2p", "dualprompt", "coda", "pcl-eq1", "pcl"]
NOTHING_FORGOTTEN = [
    "probe",
    "pooled-probe",
    "single",
    "copy",
    "piggyback",
    "peterrec",
    "conure",
    "coda",
    "pcl-eq1",
    "pcl",
    "pcl-no-backbone",
]
OWN = {  # what a method trains besides readout and head
    "fine": lambda made: made.model.backbone.parameters(),
    "copy": lambda made: made.copies["segment"].parameters(),
    "single": lambda made: made.copies["segment"].parameters(),
    "hat": lambda made: [*made.model.backbone.parameters(), *made.open.values()],
    "piggyback": lambda made: made.real.values(),
    "peterrec": lambda made: made.patches["segment"].parameters(),
    "teracon": lambda made: [*made.model.backbone.parameters(), *made.relations.mlp[1].parameters()],
    "l2p": lambda made: [made.keys, made.pool],
    "dualprompt": lambda made: [made.general, made.expert["segment"]],
    "coda": lambda made: [made.keys[-1], made.attention[-1], made.rows[-1]],
    "mtl": lambda made: [*made.model.backbone.parameters(), *made.model.task("next").head.parameters()],
    "mmoe": lambda made: [*made.model.backbone.parameters(), *made.experts.parameters()],
}
SEQUENTIAL = [name for name, kind in LEARNERS.items() if not kind.joint]


def wake(learner, name):
    """A task's head is not at zero, where it asks nothing of the backbone."""
    for parameter in learner.model.task(name).head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def weights(learner):
    return {name: value.clone() for name, value in learner.model.backbone.state_dict().items()}


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_a_task_is_learned_and_closed(method, learner, monkeypatch):
    """What its users are told apart by is more than how often each class occurs, which every head starts from."""
    monkeypatch.setattr(ewc, "USERS", 20)
    made = learner(method)
    made.first()
    made.learn("segment")
    metrics, loss = made.measure("segment", "train")
    target = made.world.train_examples("segment").target
    share = target.bincount().double() / len(target)
    assert made.model.task("segment").closed
    assert loss < -float(share @ share.log())
    assert metrics["accuracy"] >= float(share.max())
    assert made.parameters_of("segment") > 0


@pytest.mark.parametrize("method", OWN)
def test_all_that_a_method_trains_moves(method, learner):
    made, moved = learner(method), []
    train = made._train

    def watched(names, *arguments):
        before = [p.detach().clone() for p in OWN[method](made)]
        train(names, *arguments)
        moved.extend(not torch.equal(p, then) for p, then in zip(OWN[method](made), before, strict=True))

    made._train = watched
    if made.joint:
        made.learn_all()
    else:
        made.learn("segment")
    assert moved
    assert all(moved)


@pytest.mark.parametrize("method", ["teracon", "l2p", "coda"])
def test_what_a_method_asks_besides_is_weighted_by_its_strength(method, learner):
    losses = []
    for strength in (0.0, 1.0, 3.0):
        made = learner(method, strength=strength)
        torch.manual_seed(0)
        made.start_task("segment")
        made.begin("segment")
        with torch.no_grad():
            for parameter in made.trained():
                parameter += 0.1 * torch.randn_like(parameter)
        made.eval()
        losses.append(made.loss(one_batch(made, "segment"), "segment").item())
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


@pytest.mark.parametrize("method", FROZEN)
def test_the_backbone_is_unchanged(method, learner):
    made = learner(method)
    before = weights(made)
    made.learn("segment")
    assert all(torch.equal(before[name], value) for name, value in weights(made).items())


@pytest.mark.parametrize("method", NOTHING_FORGOTTEN)
def test_outputs_of_an_earlier_task_keep_their_bits(method, learner, outputs):
    made = learner(method)
    made.first()
    made.learn("range")
    before = {name: outputs(made, name) for name in ("next", "range")}
    made.learn("segment")  # the weights of range may stay at their start
    assert all(torch.equal(before[name], outputs(made, name)) for name in before)


def test_fine_tuning_moves_the_backbone_and_earlier_outputs(learner, outputs):
    made = learner("fine")
    before = outputs(made, "next")
    made.learn("segment")
    assert not torch.equal(before, outputs(made, "next"))


@pytest.mark.parametrize("method", ["single", "copy"])
def test_every_task_has_a_backbone_of_its_own(method, learner):
    made = learner(method)
    shared = weights(made)
    made.learn("segment")
    made.learn("range")
    first, second = (made.copies[name].table for name in ("segment", "range"))
    assert not torch.equal(first, second)
    assert all(torch.equal(shared[name], value) for name, value in weights(made).items())


def test_a_copy_has_dropout_while_it_learns(learner):
    made = learner("copy")
    made.start_task("segment")
    made.train()
    assert made.copies["segment"].training
    assert not made.model.backbone.training
    made.end("segment")
    made.train()
    assert not made.copies["segment"].training


@pytest.mark.parametrize(("method", "same"), [("copy", True), ("single", False)])
def test_from_scratch_starts_elsewhere(method, same, learner):
    made = learner(method)
    assert torch.equal(made.start().table, made.model.backbone.table) == same


def test_ewc_gradient_is_strength_times_fisher_times_distance(learner):
    made = learner("ewc", strength=3.0)
    made.fisher = [torch.rand_like(p) for p in made.trained()]
    with torch.no_grad():
        for p in made.trained():
            p += 0.1
    made.anchoring().backward()
    for fisher, parameter, anchor in zip(made.fisher, made.trained(), made.anchor):
        torch.testing.assert_close(parameter.grad, 3.0 * fisher * (parameter.detach() - anchor))


def test_single_starts_an_items_task_at_rows_of_its_own_backbone(learner):
    made = learner("single")
    catalogue = made.world.dataset.task("range").spec.catalogue
    known = torch.tensor(catalogue[: len(catalogue) // 2])
    made.model.backbone.trained_items[known] = True
    made.start_task("range")
    rows = made.model.task("range").head.rows[: len(known)]
    assert torch.equal(rows, made.copies["range"].table[known])
    assert not torch.equal(rows, made.model.backbone.table[known])


def test_ewc_fisher_is_the_mean_squared_gradient_of_single_users(learner, monkeypatch):
    whole = World.train_examples
    monkeypatch.setattr(World, "train_examples", lambda world, name: whole(world, name).select(torch.arange(20)))
    made = learner("ewc")
    made.start_task("segment")
    wake(made, "segment")
    made.fisher = [torch.zeros_like(f) for f in made.fisher]
    made.end("segment")
    examples = made.world.train_examples("segment")
    want = torch.zeros_like(made.model.backbone.norm.weight)
    for user in torch.arange(len(examples)):
        batch = make_batch(made.world.dataset, examples, user[None], made.model.backbone.config.max_len)
        (grad,) = torch.autograd.grad(made.task_loss(batch, "segment"), [made.model.backbone.norm.weight])
        want += grad.square() / len(examples)
    index = [id(p) for p in made.trained()].index(id(made.model.backbone.norm.weight))
    assert want.sum() > 0
    torch.testing.assert_close(made.fisher[index], want)


def test_ewc_holds_weights_where_the_last_task_left_them(learner, monkeypatch):
    monkeypatch.setattr(ewc, "USERS", 20)
    made = learner("ewc")
    made.first()
    first = [fisher.clone() for fisher in made.fisher]
    assert any((fisher > 0).any() for fisher in first)
    made.start_task("segment")
    wake(made, "segment")
    with torch.no_grad():
        for parameter in made.trained():
            parameter += 0.1
    batch = one_batch(made, "segment")
    made.eval()
    assert made.anchoring() > 0
    torch.testing.assert_close(made.loss(batch, "segment"), made.task_loss(batch, "segment") + made.anchoring())
    made.end("segment")
    assert made.anchoring() == 0
    assert all((now >= then).all() for now, then in zip(made.fisher, first))
    assert any((now > then).any() for now, then in zip(made.fisher, first))


def test_lwf_adds_the_mean_distillation_of_all_earlier_tasks(learner):
    made = learner("lwf", strength=3.0)
    made.start_task("segment")
    wake(made, "segment")
    made.model.task("segment").close()
    made.start_task("range")
    made.begin("range")
    with torch.no_grad():
        for parameter in made.trained():
            parameter += 0.1 * torch.randn_like(parameter)
    batch, kept = one_batch(made, "range"), []
    made.eval()
    for name in ("next", "segment"):
        task = made.model.task(name)
        then = task(made.encode(batch.history, name, made.previous), made.previous.table)
        kept.append(distillation(task, made.output(batch.history, name), then))
    assert min(kept) > 0
    want = made.task_loss(batch, "range") + 3.0 * sum(kept) / 2
    torch.testing.assert_close(made.loss(batch, "range"), want)


def test_distillation_is_the_divergence_at_temperature_two():
    now, then = torch.randn(5, 4), torch.randn(5, 4)
    task = SimpleNamespace(spec=TaskSpec("t", "classes", num_classes=4))
    q, p = ((x / 2).softmax(1) for x in (now, then))
    torch.testing.assert_close(distillation(task, now, then), 4 * (p * (p / q).log()).sum(1).mean())


def test_lwf_distils_the_previous_model(learner):
    made = learner("lwf")
    made.start_task("segment")
    made.begin("segment")
    made.eval()
    batch = one_batch(made, "segment")
    alone = made.task_loss(batch, "segment")
    torch.testing.assert_close(made.loss(batch, "segment"), alone)  # nothing has moved yet
    with torch.no_grad():
        weight = made.model.backbone.layers[0].qkv.weight
        weight += 0.1 * torch.randn_like(weight)  # a constant would vanish: normalised rows have mean 0
    assert made.loss(batch, "segment") > made.task_loss(batch, "segment")


@pytest.mark.parametrize("kind", ["items", "binary", "classes", "regression"])
def test_distillation_is_zero_at_the_teacher_and_pulls_there(kind):
    spec = TaskSpec("t", kind, num_classes=4 if kind == "classes" else None)
    task = SimpleNamespace(spec=spec, head=SimpleNamespace(unit=torch.tensor([0.0, 2.0])))
    then = torch.randn(5, 4) if kind in ("items", "classes") else torch.randn(5)
    assert float(distillation(task, then, then)) == pytest.approx(0, abs=1e-6)
    now = (then + torch.randn_like(then)).requires_grad_()
    loss = distillation(task, now, then)
    loss.backward()
    assert distillation(task, now.detach() - 1e-3 * now.grad, then).item() < loss.item()


def test_piggyback_starts_as_the_backbone_and_stores_a_bit_a_weight(learner):
    made = learner("piggyback")
    batch = one_batch(made, "segment")
    made.start_task("segment")
    made.begin("segment")
    made.eval()
    with torch.no_grad():  # one way of computing for both
        plain = made.encode(batch.history, "segment", made.model.backbone).newest
        assert torch.equal(made.encode(batch.history, "segment").newest, plain)
    made.end("segment")
    masks = made.masks["segment"]
    assert all(mask.all() for mask in masks.values())
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert made.extra_parameters("segment") * 32 == sum(w.numel() for w in made.matrices().values())


def test_piggyback_gradient_passes_the_threshold_straight():
    real = torch.tensor([1e-2, 0.0, -1.0], requires_grad=True)
    mask = Binary.apply(real)
    mask.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert mask.tolist() == [1, 0, 0]
    assert real.grad.tolist() == [1, 2, 3]


def test_peterrec_starts_as_the_backbone(learner):
    made = learner("peterrec")
    batch = one_batch(made, "segment")
    made.start_task("segment")
    made.begin("segment")
    plain = made.encode(batch.history, "segment", made.model.backbone)
    torch.testing.assert_close(made.encode(batch.history, "segment").newest, plain.newest, rtol=0, atol=0)
    made.end("segment")
    dim = made.model.backbone.config.dim
    assert made.extra_parameters("segment") == 2 * (2 * dim * (dim // 4) + dim + dim // 4)


def test_pcl_is_the_packages_own_training(learner):
    made, plain = learner("pcl"), learner("pcl")
    made.learn("segment")
    learn_task(plain.model, plain.world.dataset, "segment", plain.world.learn_config(), plain.memory("segment"))
    for (name, got), want in zip(made.model.state_dict().items(), plain.model.state_dict().values()):
        assert torch.equal(got, want), name


def test_flags_are_no_parameters(learner):
    made = learner("copy")
    assert made.parameters_of("next") == sum(p.numel() for p in made.start().parameters())


def test_without_backbone_all_states_are_zero(learner):
    made = learner("pcl-no-backbone")
    made.learn("segment")
    for batch in batches_of(made.world.dataset, made.world.dataset.examples("segment", "valid"), made.model, None):
        assert all((state == 0).all() for state in made.model.backbone(batch.history))


def test_a_trainable_copy_gives_the_same_states(learner):
    backbone = learner("probe").model.backbone
    batch = one_batch(learner("probe"), "segment")
    twin = trainable_copy(backbone).eval()
    assert len(list(twin.parameters()))
    for got, want in zip(twin(batch.history), copy.deepcopy(backbone)(batch.history)):
        torch.testing.assert_close(got, want)


def test_a_large_catalogue_is_scored_a_few_histories_at_a_time(learner, monkeypatch):
    made = learner("probe")
    whole, loss = made.measure("next", "test")
    monkeypatch.setattr("benchmarks.continual.learner.MOST_SCORES", 50 * 7)
    sizes = []
    parts, split = made.measure("next", "test", lambda batch, *_: sizes.append(len(batch.history)))
    assert max(sizes) == 7
    assert parts == pytest.approx(whole)
    assert split == pytest.approx(loss)
