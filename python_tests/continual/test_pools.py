"""The property that defines each prompt pool: L2P, DualPrompt, CODA-Prompt."""

import pytest
import torch

from benchmarks.continual.methods.coda import apart
from pcl_ext.data import make_batch


def test_l2p_takes_the_prompts_whose_keys_match_best(learner):
    made = learner("l2p")
    made.start_task("segment")
    query = torch.randn(3, made.model.backbone.config.dim)
    with torch.no_grad():
        made.keys[7] = query[1] * 5
    rows = made.prompts(query, "segment")
    assert 7 in made.match.indices[1]
    assert torch.equal(rows[1, : made.pool.shape[1]], made.pool[made.match.indices[1, 0]])
    before = (1 - made.match.values).mean().item()
    (1 - made.match.values).mean().backward()
    with torch.no_grad():
        made.keys -= 0.01 * made.keys.grad
        made.prompts(query, "segment")
    assert (1 - made.match.values).mean().item() < before


@pytest.mark.parametrize("method", ["l2p", "coda"])
def test_a_history_has_the_prompts_of_its_own_query(method, learner):
    made = learner(method)
    made.start_task("segment")
    made.begin("segment")
    made.eval()
    examples = made.world.train_examples("segment")

    def newest(rows):
        history = make_batch(made.world.dataset, examples, torch.tensor(rows), 20).history
        return made.encode(history, "segment").newest

    with torch.no_grad():
        torch.testing.assert_close(newest([0, 1, 2]), torch.cat([newest([0]), newest([1]), newest([2])]))


def test_dualprompt_shares_general_prompts_and_freezes_expert_ones(learner):
    made = learner("dualprompt")
    made.learn("range")
    general, expert = made.general.detach().clone(), made.expert["range"].detach().clone()
    made.learn("segment")
    assert not torch.equal(general, made.general)
    assert torch.equal(expert, made.expert["range"])
    keys = made.prefix(None, "range").keys
    assert torch.equal(keys[0], made.general[0, 0])
    assert torch.equal(keys[1], expert[0, 0])


def test_coda_components_start_apart_from_all_others(learner):
    made = learner("coda")
    for name in made.world.tasks:
        made.start_task(name)
        made.begin(name)
    for group in (made.keys, made.attention, made.rows):
        rows = torch.cat([part.detach().flatten(1) for part in group])
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)


def test_coda_refuses_more_tasks_than_its_components_can_be_apart_for():
    generator, rows = torch.Generator(), torch.zeros(0, 8)
    for _ in range(2):
        rows = torch.cat([rows, apart(rows, generator)])
    with pytest.raises(ValueError, match="orthogonal for 2 tasks at most"):
        apart(rows, generator)


@pytest.mark.parametrize("name", ["items", "values", "training"])
def test_dualprompt_takes_any_task_name(name, learner):
    made = learner("dualprompt")
    made.begin(name)
    assert made.extra_parameters(name) == made.expert[name].numel() > 0


def test_coda_weighs_components_by_attended_queries_and_freezes_old_ones(learner):
    made = learner("coda")
    made.learn("segment")
    old = [p.detach().clone() for p in (made.keys[0], made.attention[0], made.rows[0])]
    made.learn("range")
    assert all(torch.equal(a, b) for a, b in zip(old, (made.keys[0], made.attention[0], made.rows[0])))
    query = torch.randn(2, made.model.backbone.config.dim)
    count = made.parts["range"]
    assert count == 2
    keys, attention, rows = (torch.cat(list(part)) for part in (made.keys, made.attention, made.rows))
    weight = torch.cosine_similarity(query[0][None] * attention, keys, dim=1)
    torch.testing.assert_close(made.prompts(query, "range")[0], (weight[:, None, None] * rows).sum(0))
