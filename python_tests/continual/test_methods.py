"""The property that defines each method."""

import copy
from types import SimpleNamespace

import pytest
import torch

from benchmarks.continual.learner import World, batches_of, trainable_copy
from benchmarks.continual.loop import Run, train
from benchmarks.continual.methods import LEARNERS, ewc
from benchmarks.continual.methods.gates import freedom, gated, widths
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
SEQUENTIAL = [name for name, kind in LEARNERS.items() if not kind.joint]


def one_batch(learner, name):
    return make_batch(
        learner.world.dataset,
        learner.world.train_examples(name),
        torch.arange(16),
        learner.model.backbone.config.max_len,
    )


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
    made.learn("segment")
    before = {name: outputs(made, name) for name in ("next", "segment")}
    made.learn("range")
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
    made.fisher = [torch.zeros_like(f) for f in made.fisher]
    made.end("segment")
    examples = made.world.train_examples("segment")
    want = torch.zeros_like(made.model.backbone.norm.weight)
    for user in torch.arange(len(examples)):
        batch = make_batch(made.world.dataset, examples, user[None], made.model.backbone.config.max_len)
        (grad,) = torch.autograd.grad(made.task_loss(batch, "segment"), [made.model.backbone.norm.weight])
        want += grad.square() / len(examples)
    index = [id(p) for p in made.trained()].index(id(made.model.backbone.norm.weight))
    torch.testing.assert_close(made.fisher[index], want)


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


def test_hat_masked_weights_do_not_move(learner):
    made = learner("hat")
    made.first()
    used = {name: factor == 0 for name, factor in freedom(made.model.backbone, made.past).items()}
    before = {name: p.detach().clone() for name, p in made.model.backbone.named_parameters()}
    made.learn("segment")
    after = dict(made.model.backbone.named_parameters())
    assert sum(int(mask.sum()) for mask in used.values()) > 0
    assert all(torch.equal(before[name][mask], after[name][mask]) for name, mask in used.items())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_hat_standardises_features_with_all_gates_open(learner):
    made, plain = learner("hat"), learner("fine")
    for method in (made, plain):
        torch.manual_seed(0)
        method.start_task("segment")
        method.begin("segment")
        method.fit_head("segment")
    assert "segment" not in made.closed
    got, want = (method.model.task("segment").state_dict() for method in (made, plain))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


def test_hat_outputs_do_not_depend_on_what_a_closed_gate_keeps_out(learner, outputs):
    """Gates of 0 and 1: weights that no earlier task uses may be anything."""
    made = learner("hat")
    made.first()
    past = {unit: (torch.rand(n) < 0.5).float() for unit, n in widths(made.model.backbone.config).items()}
    made.closed["next"] = made.past = past
    before = outputs(made, "next")
    with torch.no_grad():
        for name, factor in freedom(made.model.backbone, past).items():
            dict(made.model.backbone.named_parameters())[name].add_(torch.randn_like(factor) * factor)
    assert torch.equal(before, outputs(made, "next"))


def test_hat_gradient_of_the_embedding_is_compensated(learner):
    made = learner("hat")
    made.start_task("segment")
    made.begin("segment")
    made.progress = 0.5
    made.train()
    for e in made.open.values():
        e.grad = torch.ones_like(e)
    made.before_step()
    s = 1 / 400 + (400 - 1 / 400) * 0.5
    for e in made.open.values():
        want = 400 / s * (torch.cosh((s * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)
        torch.testing.assert_close(e.grad, want.detach())


def test_open_gates_are_the_backbone_itself(learner):
    made = learner("hat")
    backbone = made.model.backbone
    ones = {unit: torch.ones(n) for unit, n in widths(backbone.config).items()}
    assert all(torch.equal(w, dict(backbone.named_parameters())[n]) for n, w in gated(backbone, ones).items())


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


def test_conure_shares_and_frozen_weights(learner):
    made = learner("conure", keep=0.3)
    made.first()
    total = sum(owner.numel() for owner in made.owner.values())
    assert made.owned("next") / total == pytest.approx(0.3, abs=0.01)
    named = dict(made.model.backbone.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    first = {name: owner == 1 for name, owner in made.owner.items()}
    made.learn("segment")
    assert made.owned("segment") / total == pytest.approx(0.7 * 0.3, abs=0.01)
    assert all(torch.equal(before[name][mask], named[name][mask]) for name, mask in first.items())
    assert all(torch.equal(before[name], p) for name, p in named.items() if name not in made.owner)
    assert all((named[name][owner == 0] == 0).all() for name, owner in made.owner.items())


def test_conure_later_tasks_read_earlier_weights(learner):
    made = learner("conure")
    made.first()
    made.learn("segment")
    batch = one_batch(made, "segment")
    view = made.view("segment")
    name, owner = next(iter(made.owner.items()))
    own = dict(made.model.backbone.named_parameters())[name]
    assert torch.equal(view.weights[name][owner == 1], own[owner == 1])
    assert not torch.equal(made.encode(batch.history, "next").newest, made.encode(batch.history, "segment").newest)


def test_teracon_gates_know_the_other_tasks(learner):
    made = learner("teracon")
    made.eval()
    alone = made.gates("next")["stream"].clone()
    made.relations.met.append("segment")
    assert not torch.equal(alone, made.gates("next")["stream"])
    own = made.gates("segment")["stream"].clone()
    with torch.no_grad():
        made.relations.embedding[0] -= 2  # tanh takes its sign
    assert not torch.equal(own, made.gates("segment")["stream"])
    assert all((gate < 1).any() for gate in made.gates("next").values())


def test_teracon_begins_with_the_pretrained_backbone_whichever_tasks_are_met(learner):
    made = learner("teracon")
    made.eval()
    for _ in range(2):
        assert all((gate > 0.5).all() for gate in made.gates("next").values())
        made.relations.met += made.world.tasks


def test_teracon_retains_the_previous_outputs(learner):
    made = learner("teracon")
    made.start_task("segment")
    made.begin("segment")
    made.relations.met.remove("segment")  # the relations as the previous model knew them
    batch = one_batch(made, "segment")
    made.relations.met.append("segment")
    made.previous[1].met.append("segment")
    for made.progress in (0.0, 0.3, 1.0):  # the gates of both open alike within an epoch
        made.train().model.eval()  # without dropout
        assert made.retention(batch, "segment").item() == pytest.approx(0, abs=1e-9)
    made.eval()
    with torch.no_grad():
        made.model.backbone.layers[0].qkv.weight += 0.1
    loss = made.retention(batch, "segment")
    loss.backward()
    assert loss > 0
    assert made.model.backbone.layers[0].qkv.weight.grad.abs().sum() > 0


def test_pcl_is_the_packages_own_training(learner):
    made, plain = learner("pcl"), learner("pcl")
    made.learn("segment")
    learn_task(plain.model, plain.world.dataset, "segment", plain.world.learn_config(), plain.memory("segment"))
    for (name, got), want in zip(made.model.state_dict().items(), plain.model.state_dict().values()):
        assert torch.equal(got, want), name


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


@pytest.mark.parametrize(("steps", "seen"), [(1, [1.0]), (3, [0.0, 0.5, 1.0])])
def test_gates_close_within_an_epoch_of_however_few_steps(steps, seen, learner):
    made, progress = learner("hat"), []
    weight = torch.nn.Parameter(torch.zeros(2))

    def loss(step):
        progress.append(made.progress)
        return weight.sum()

    run = Run(lambda epoch: (steps, range(steps)), loss, lambda: 0.0, epochs=1, patience=1)
    made.open, made.before_step, made.after_step = torch.nn.ParameterDict(), lambda: None, lambda: None
    train(made, torch.optim.SGD([weight], 0.1), run)
    assert progress == seen


def test_a_large_catalogue_is_scored_a_few_histories_at_a_time(learner, monkeypatch):
    made = learner("probe")
    whole, loss = made.measure("next", "test")
    monkeypatch.setattr("benchmarks.continual.learner.MOST_SCORES", 50 * 7)
    sizes = []
    parts, split = made.measure("next", "test", lambda batch, *_: sizes.append(len(batch.history)))
    assert max(sizes) == 7
    assert parts == pytest.approx(whole)
    assert split == pytest.approx(loss)
