"""The property that defines each method that divides the backbone's weights among tasks: HAT, CONURE, TERACON."""

import math

import pytest
import torch
from learners import one_batch

from benchmarks.continual.loop import Run, train
from benchmarks.continual.methods.gates import freedom, gated, widths


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


def test_hat_keeps_what_any_earlier_task_used(learner):
    made = learner("hat")
    made.first()
    used = {unit: past.clone() for unit, past in made.past.items()}
    made.begin("segment")
    with torch.no_grad():
        for e in made.open.values():
            e.fill_(-6.0)
    made.end("segment")
    assert all(torch.equal(made.past[unit], past) for unit, past in used.items())


def test_hat_is_charged_for_the_free_units_it_takes(learner):
    made = learner("hat", strength=3.0)
    made.start_task("segment")
    made.begin("segment")
    made.eval()
    made.past = {unit: (torch.rand_like(past) < 0.5).float() for unit, past in made.past.items()}
    gates, past = (torch.cat(list(part.values())) for part in (made.gates("segment"), made.past))
    torch.testing.assert_close(made.penalty("segment"), 3.0 * (gates * (1 - past)).sum() / (1 - past).sum())
    batch = one_batch(made, "segment")
    want = made.task_loss(batch, "segment") + made.penalty("segment")
    torch.testing.assert_close(made.loss(batch, "segment"), want)


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


def test_hat_frees_a_weight_as_far_as_the_less_used_of_its_ends(learner):
    backbone = learner("hat").model.backbone
    past = {unit: torch.rand(n) for unit, n in widths(backbone.config).items()}
    factor = freedom(backbone, past)
    to, source = past["ffn.1"], past["stream"]
    assert factor["layers.1.ffn_in.weight"][5, 3] == 1 - min(to[5], source[3])
    assert factor["layers.1.ffn_out.weight"][3, 5] == 1 - min(to[5], source[3])
    assert torch.equal(factor["layers.1.ffn_in.bias"], 1 - to)
    assert torch.equal(factor["table"][7], 1 - source)


def test_hat_embeddings_stay_within_six(learner):
    made = learner("hat")
    made.begin("segment")
    with torch.no_grad():
        for e in made.open.values():
            e.mul_(100)
    made.held.before()
    made.after_step()
    assert all(e.abs().max() == 6 for e in made.open.values())


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


def test_conure_trains_again_what_pruning_left(learner):
    made, owned, number = learner("conure"), [], {"next": 1, "segment": 2}

    def watched(train, name):
        def run(*arguments):
            before = [p.detach().clone() for key, p in made.model.backbone.named_parameters() if key in made.owner]
            train(*arguments)
            after = [p for key, p in made.model.backbone.named_parameters() if key in made.owner]
            moved = [a != b for a, b in zip(before, after)]
            own = [owner == number[name] for owner in made.owner.values()]
            owned.append((arguments[-1], all((o | ~m).all() for o, m in zip(own, moved)), any(m.any() for m in moved)))

        return run

    made.fit_next = watched(made.fit_next, "next")
    made.first()
    made.fit = watched(made.fit, "segment")
    made.learn("segment")
    epochs = made.world.budget.retrain_epochs
    assert owned == [(epochs, True, True), ("segment", False, True), (epochs, True, True)]


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


def test_teracon_gates_follow_their_formula(learner):
    made = learner("teracon")
    relations = made.relations
    relations.met = list(relations.names)
    place = relations.names.index("range")
    own, *others = (relations.embedding[i] for i in (place, *(i for i in range(3) if i != place)))
    joined = torch.cat([own, *(sign * e for e in others for sign in (1, -1))])
    want = torch.sigmoid(2.0 * relations.mlp[place](torch.tanh(2.0 * joined)))
    torch.testing.assert_close(torch.cat(list(relations("range", 2.0).values())), want)


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


def test_teracon_retains_what_is_unlike_the_task_that_is_learned(learner, monkeypatch):
    made = learner("teracon")
    units = {"next": (1.0, 0.0), "segment": (1.0, 1.0), "range": (1.0, 0.0)}
    made.gates = lambda name: {"stream": torch.tensor(units[name]), "ffn.0": torch.tensor((1.0, 1.0))}
    same, half = 1 / (1 + math.exp(-6)), 1 / (1 + math.exp(-6 * 0.5**0.5))
    assert float(made.need("range", "next")) == pytest.approx(1 - same)
    assert float(made.need("range", "segment")) == pytest.approx(1 - (same + half) / 2)
    del made.gates
    made.start_task("segment")
    made.start_task("range")
    made.begin("range")
    monkeypatch.setattr(type(made), "need", lambda self, name, other: torch.tensor(float(other == "segment")))
    read, output = [], made.output
    made.output = lambda history, name: read.append(name) or output(history, name)
    for _ in range(5):
        made.retention(one_batch(made, "range"), "range")
    assert set(read) == {"segment"}


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
