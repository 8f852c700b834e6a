"""Promises of the user model: rows are independent, tasks mix, prefixes are shared, closed tasks never move."""

import pytest
import torch
from model_cases import PLACEMENTS, SPECS, V, add, histories, pack

from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig
from pcl_ext.model.encoded import encode
from pcl_ext.task import TaskSpec


def add_all(model, placement="tail", **options):
    for length, name in enumerate(SPECS, start=2):
        add(model, name, placement, length, **options)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", SPECS)
def test_output_of_a_user_does_not_depend_on_the_batch(model, name, placement):
    add(model, name, placement)
    together = model(pack(histories()), name)
    alone = torch.cat([model(pack([history]), name) for history in histories()])
    torch.testing.assert_close(together, alone)


def test_a_batch_may_mix_tasks_and_placements(model):
    for name, placement, length in zip(SPECS, ["both", "tail", "none", "prefix"], [3, 5, 4, 2]):
        add(model, name, placement, length)
    batch = pack(histories())
    index = torch.tensor([3, 0, 1, 0, 2, 3])
    outputs = model(batch, task_index=index)
    assert list(outputs) == [model.task_names[i] for i in index.unique()]
    for name, (rows, output) in outputs.items():
        assert torch.equal(rows, torch.nonzero(index == model.task_names.index(name))[:, 0])
        torch.testing.assert_close(output, model(batch, name)[rows])


def test_gradients_of_a_mixed_batch_are_those_of_each_task_alone(model):
    add_all(model, "both")
    batch, index = pack(histories()), torch.tensor([3, 0, 1, 0, 2, 3])
    sum(output.square().sum() for _, output in model(batch, task_index=index).values()).backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for place, name in enumerate(model.task_names):
        model(batch, name)[index == place].square().sum().backward()
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", [[0, 1], [0, 0, 0, 0, 0, 9], [-1, 0, 0, 0, 0, 0]], ids=str)
def test_task_index_must_fit(model, index):
    add_all(model)
    with pytest.raises(ValueError, match="task_index must be"):
        model(pack(histories()), task_index=torch.tensor(index))


def test_task_index_is_a_tensor(model):
    add_all(model)
    with pytest.raises(TypeError, match=r"task_index must be a Tensor \[6\] int64, got list"):
        model(pack(histories()), task_index=[0] * 6)


def test_a_zero_tail_prompt_is_the_frozen_backbone(model):
    model.add_task(SPECS["rank"], MemoryConfig(placement="tail", readout=("last",)))
    batch = pack(histories())
    states = model.backbone(batch)
    assert torch.equal(model.encode(batch, ["rank"])["rank"][2], states[-1][batch.last_rows[2]])


def test_shared_prefix_equals_prompts_as_tokens_of_every_user(model):
    """Design: attention use 1. Naive: the prompt rows in front of every history, one long causal sequence each."""
    task, batch = add(model, "click", "prefix", 4), pack(histories())
    shared = model.backbone(batch, prefix=task.layer_prefix(model.backbone))
    rows = model.backbone.embed(batch.items, batch.offsets)
    pieces, lengths = [], []
    for user in range(len(batch)):
        own = rows[batch.offsets[user] : batch.offsets[user + 1]]
        pieces += [task.prefix(), own]
        lengths += [len(own) + 4]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    naive, _ = model.backbone.run(torch.cat(pieces), offsets)
    is_prompt = torch.cat([torch.arange(n) < 4 for n in lengths])
    for got, want in zip(shared, naive):
        torch.testing.assert_close(got, want[~is_prompt])


def test_shared_trunk_equals_every_task_alone(model):
    """Design: attention use 2, the tails of several tasks against one trunk; lengths differ, one has no prompt."""
    for name, placement, length in zip(SPECS, ["tail", "none", "tail", "tail"], [3, 4, 25, 1]):
        add(model, name, placement, length, readout=("last", "mean", "item_memory"))
    batch = pack(histories())
    together = model.encode(batch)
    for name in SPECS:
        torch.testing.assert_close(together[name], model.encode(batch, [name])[name])


@pytest.mark.parametrize("readout", [("last",), ("last", "mean", "item_memory")], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_computing_only_what_is_read_changes_nothing(model, placement, readout):
    """The last layer for the newest rows alone, and gradients through the tails alone, against a whole pass."""
    task, batch = add(model, "click", placement, 4, readout=readout), pack(histories())
    got = model(batch, "click")
    got.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in task.named_parameters()}
    model.zero_grad()
    prompt = None if task.tail() is None else task.tail()[None]
    whole = encode(model.backbone, batch, prompt, None, task.layer_prefix(model.backbone), every_state=True)
    want = task(whole, model.backbone.table)
    torch.testing.assert_close(got, want)
    want.square().sum().backward()
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contextual", ["texts", "prompts"])
@pytest.mark.parametrize("placement", ["tail", "prefix", "both"])
def test_closing_folds_the_contextual_prompt(model, placement, contextual):
    add(model, "click", placement)
    model.freeze_task("click")
    task = add(model, "age", placement, contextual=contextual)
    assert task.depends_on == ["click"]
    batch = pack(histories())
    before = model(batch, "age")
    model.freeze_task("age")
    torch.testing.assert_close(model(batch, "age"), before)
    assert task.context is None
    assert not list(task.parameters())


@pytest.mark.parametrize("contextual", ["texts", "prompts"])
def test_a_contextual_prompt_starts_at_zero_and_learns(model, contextual):
    add(model, "click")
    model.freeze_task("click")
    task = model.add_task(SPECS["age"], MemoryConfig(prompt_len=4, contextual=contextual))
    assert not task.tail().any()
    task.tail().sum().backward()
    assert task.context.out.weight.grad.abs().max() > 0


def test_learning_on_leaves_closed_tasks_bit_for_bit(model):
    add_all(model)
    for name in ("rank", "click"):
        model.freeze_task(name)
    batch = pack(histories())
    before = {name: model(batch, name).clone() for name in ("rank", "click")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model.train()(batch, "age").square().sum() + model(batch, "value").square().sum()).backward()
        optimizer.step()
    model.eval()
    assert all(torch.equal(model(batch, name), before[name]) for name in before)


def test_predict_for_new_users_unknown_ids_and_empty_histories(model):
    add_all(model, whole_history=False)
    lists = [[1, 2, 3], [], [10**9, 2, -4, 0], [30, 31, *range(21, 41)]]
    with pytest.warns(UserWarning, match="3 unknown item ids"):
        ranked = model.predict(lists, "rank", k=5)
    assert [len(answer["items"]) for answer in ranked] == [5] * 4
    assert all(5 <= item < 25 for answer in ranked for item in answer["items"])
    for place, same in ((2, [2]), (3, list(range(21, 41)))):
        alone = model.predict([same], "rank", k=5)[0]
        assert ranked[place]["items"] == alone["items"]
        assert ranked[place]["scores"] == pytest.approx(alone["scores"], rel=1e-5)
    assert set(model.predict([[1]], "click")[0]) == {"probability"}
    assert sum(model.predict([[1]], "age")[0]["probabilities"]) == pytest.approx(1, abs=1e-6)
    assert set(model.predict([[]], "value")[0]) == {"value"}
    assert model.predict([], "rank") == []


def test_items_seen_already_rank_last_where_targets_are_new(model):
    task = add(model, "rank")
    seen = [5, 9, 24]
    answer = model.predict([seen], "rank", k=20)[0]
    assert sorted(answer["items"][-3:]) == seen
    assert sorted(answer["items"]) == list(task.spec.catalogue)


def test_each_row_of_a_history_votes_for_its_own_item_where_targets_repeat(model):
    task = model.add_task(TaskSpec("again", "items", catalogue=tuple(range(5, 25)), repeats=True))
    batch = pack([[5, 9, 5, 30], [], [9]])
    plain = model(batch, "again")
    with torch.no_grad():
        task.repeats.vote.weight.normal_()
    states = model.backbone(batch)[-1]  # its prompt is 0
    votes = task.repeats.vote(states)[:, 0]
    want = plain.clone()
    want[0, 0] += votes[0] + votes[2]  # item 5 is column 0; item 30 is not in the catalogue
    want[0, 4] += votes[1]
    want[2, 4] += votes[4]
    torch.testing.assert_close(model(batch, "again"), want)


@pytest.mark.parametrize("history", [["a"], [1.5], [[1, 2]], [True], [2**70]], ids=str)
def test_a_history_that_is_no_list_of_ids_is_refused(model, history):
    add(model, "click")
    with pytest.raises(ValueError, match="history 1 must be"):
        model.predict([[1], history], "click")


def test_unknown_tasks_and_doubled_names_are_refused(model):
    add(model, "click")
    with pytest.raises(ValueError, match="task must be one of click, got 'clik'"):
        model.predict([[1]], "clik")
    with pytest.raises(ValueError, match="is there already"):
        model.add_task(SPECS["click"])
    with pytest.raises(ValueError, match="names item 41"):
        model.add_task(TaskSpec("far", "items", catalogue=(1, 41)))


@pytest.mark.parametrize("name", SPECS)
def test_a_closed_task_is_not_fitted_again(model, name):
    add(model, name)
    model.freeze_task(name)
    task, batch = model.task(name), pack(histories())
    before = model(batch, name)
    features, target = torch.randn(4, len(task.shift)), torch.ones(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"task '{name}' is closed and never changes: remove it to learn it anew"):
        task.fit_head(features, target)
    with pytest.raises(ValueError, match="is closed and never changes"):
        task.start_items(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))
    assert torch.equal(model(batch, name), before)


def test_a_frozen_backbone_stays_in_evaluation_mode_whoever_holds_it(model):
    add(model, "click")
    model.freeze_task("click")
    torch.nn.ModuleDict({"user": model, "backbone": model.backbone}).train()
    assert not any(module.training for module in model.backbone.modules())
    assert torch.equal(model(pack(histories()), "click"), model(pack(histories()), "click"))
    open_one = Backbone(BackboneConfig(V, dim=16))
    assert open_one.eval().train().training
