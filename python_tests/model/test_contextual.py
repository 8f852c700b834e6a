"""The contextual prompt: attention over tasks, and the vector of a task's text."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import SPECS, add

from pcl_ext.model import MemoryConfig
from pcl_ext.model.memories import ContextualPrompt, hashed_text_vector
from pcl_ext.model.memories.contextual import TEXT_DIM


@torch.no_grad()
@pytest.mark.parametrize("kind", ["texts", "prompts"])
def test_it_is_scaled_dot_product_attention_over_tasks(kind):
    texts = F.normalize(torch.randn(4, TEXT_DIM), dim=1)
    prompts = torch.randn(3, 5, 8) if kind == "prompts" else None
    context = ContextualPrompt(texts, prompts, 5, 8, 2)
    for parameter in context.parameters():
        parameter.normal_()
    known = texts if prompts is None else texts[:3]
    values = context.value(texts).expand(5, 4, 8) if prompts is None else context.value(prompts).transpose(0, 1)
    query = (context.query(texts[-1]) + context.positions)[:, None]
    parts = query, context.key(known).expand(5, -1, -1), values
    mixed = F.scaled_dot_product_attention(*(part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts))
    torch.testing.assert_close(context(), context.out(mixed.flatten(1)))


def test_the_vector_of_a_text_counts_words_and_pairs_and_always_has_the_same_bits():
    """Three words, one of them twice, and three pairs: of length 3 before it is scaled."""
    vector = hashed_text_vector("Will click, will buy") * 3
    places = vector.nonzero()[:, 0].tolist()
    assert places == [30, 32, 58, 79, 130, 172]
    assert vector[places].tolist() == [1, -1, 1, -1, -2, -1]


@pytest.mark.parametrize(
    ("contextual", "length", "placement", "read"),
    [
        ("prompts", 4, "tail", ["click"]),
        ("prompts", 5, "tail", []),
        ("prompts", 4, "prefix", []),
        ("texts", 5, "prefix", ["click"]),
    ],
)
def test_prompts_of_another_shape_or_place_are_not_read(model, contextual, length, placement, read):
    add(model, "click", "tail", 4)
    model.freeze_task("click")
    task = model.add_task(SPECS["age"], MemoryConfig(placement, length, contextual=contextual))
    assert task.depends_on == read
    assert (task.context is None) == (not read)
