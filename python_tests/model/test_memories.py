"""Each kind of memory: what it starts from, what it computes, and that closing it is for good."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_cases import LENGTHS, SPECS, V, add, histories, pack

from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel
from pcl_ext.model.memories.item_memory import ItemMemory, hashed_rows
from pcl_ext.store import from_pretrained, save_pretrained
from pcl_ext.task import TaskSpec

KINDS = {
    "hashed": {"readout": ("item_memory",), "item_rows": 7},
    "pooled": {"readout": ("pooled",), "pooled_units": 5},
    "low_rank": {"readout": ("last",), "low_rank": 3},
    "earlier": {"readout": ("last", "earlier"), "earlier_units": 4},
    "members": {"readout": ("mean", "item_memory", "pooled"), "pooled_units": 5, "members": 3},
    "all": {
        "readout": ("last", "mean", "item_memory", "pooled", "earlier"),
        "item_rows": 7,
        "low_rank": 2,
        "members": 2,
    },
}


def make_model(num_layers=2):
    """A frozen model that knows two closed tasks for others to read."""
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(V, dim=16, num_heads=2, num_layers=num_layers, max_len=20)))
    model.freeze_backbone()
    model.eval()
    for name in ("rank", "age"):
        add(model, name, "none")
        model.freeze_task(name)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_one_by_one(kind, num_layers):
    model = make_model(num_layers)
    add(model, "click", "none", **KINDS[kind])
    add(model, "value", "both", readout=("last", "mean"))
    batch, index = pack(histories()), torch.tensor([2, 3, 2, 1, 2, 0])
    for name, (rows, output) in model(batch, task_index=index).items():
        alone = torch.cat([model(pack([histories()[row]]), name) for row in rows.tolist()])
        torch.testing.assert_close(output, alone)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("earlier", "all")])
@pytest.mark.parametrize("placement", ["none", "tail"])
def test_many_tasks_on_one_trunk_equal_each_alone(model, kind, placement):
    add(model, "click", placement, 3, **KINDS[kind])
    add(model, "value", "tail", 5)
    together = model.encode(pack(histories()))
    for name in model.task_names:
        torch.testing.assert_close(together[name], model.encode(pack(histories()), [name])[name])


def test_many_tasks_of_which_one_reads_the_others(model):
    add(model, "click", "none", **KINDS["all"])
    together = model.encode(pack(histories()))
    for name in model.task_names:
        torch.testing.assert_close(together[name], model.encode(pack(histories()), [name])[name])


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for_gets_a_gradient(model, kind):
    task = add(model, "click", "none", **KINDS[kind])
    model(pack(histories()), "click").square().sum().backward()
    assert {name for name, _ in model.named_parameters()} == {
        f"tasks.click.{name}" for name, _ in task.named_parameters()
    }
    assert all(p.grad is not None and p.grad.any() for p in task.memory_parameters())
    assert not any(tensor.requires_grad for name in ("rank", "age") for tensor in model.task(name).buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_closed_saved_and_loaded_it_keeps_its_bits(model, tmp_path, kind):
    add(model, "click", "none", **KINDS[kind])
    model.freeze_task("click")
    before = model(pack(histories()), "click")
    add(model, "value", "none")
    model.freeze_task("value")
    assert torch.equal(model(pack(histories()), "click"), before)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.task("click").depends_on == model.task("click").depends_on
    assert torch.equal(loaded(pack(histories()), "click"), before)
    assert not list(loaded.parameters())


@pytest.mark.parametrize("kind", ["hashed", "pooled", "earlier"])
def test_a_label_starts_at_its_base_rate(model, kind):
    """The head starts at zero: whatever the memory reads, the first output is the same for all."""
    model.add_task(SPECS["click"], MemoryConfig(placement="none", **KINDS[kind]))
    assert not model(pack(histories()), "click").any()


@torch.no_grad()
@pytest.mark.parametrize("placement", ["none", "tail"])
@pytest.mark.parametrize("name", ["rank", "click"])
def test_low_rank_prompts_start_at_the_frozen_backbone_bit_for_bit(name, placement):
    model = make_model()
    model.remove_task("rank")
    model.add_task(SPECS[name], MemoryConfig(placement, 4, readout=("last",), low_rank=3))
    plain = model.backbone(pack(histories()), read="newest")[-1]
    features = model.encode(pack(histories()), [name])[name]
    filled = torch.tensor(LENGTHS) > 0
    if placement == "none":
        assert torch.equal(features[filled], plain)
    torch.testing.assert_close(features[filled], plain)
    assert not features[~filled].any()


@pytest.mark.parametrize("placement", ["none", "tail"])
def test_low_rank_prompts_are_a_backbone_with_other_weights(model, placement):
    task = add(model, "click", placement, 3, readout=("last",), low_rank=2)
    got = model.encode(pack(histories()), ["click"])["click"]
    changed = make_model().backbone
    memory = task.memories["low_rank"]
    with torch.no_grad():
        for part, up in memory.up.items():
            getattr(changed.layers[-1], part).weight += up @ memory.down[part]
        states = changed(pack(histories()), None if placement == "none" else task.tail()[None])[-1]
    want = states[pack(histories()).last_rows] * (torch.tensor(LENGTHS) > 0)[:, None]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def hasty_threads():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@torch.no_grad()
@pytest.mark.parametrize("frozen", [True, False])
def test_low_rank_prompts_leave_other_threads_their_backbone(hasty_threads, frozen):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = UserModel(Backbone(BackboneConfig(V, dim=16, num_heads=2, max_len=20))).eval()
    if frozen:
        model.freeze_backbone()
    add(model, "click", "none", **KINDS["low_rank"])
    add(model, "age", "tail", low_rank=2)
    add(model, "value", "none")
    batch, state = pack(histories()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = {name: model(batch, name) for name in model.task_names}
    names = model.task_names * 60
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(torch.no_grad()(lambda name: model(batch, name)), names))
    assert [name for name, output in zip(names, got) if not torch.equal(output, want[name])] == []
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])] == []


def test_the_pooled_readout_is_a_mean_over_time(model):
    task, batch = add(model, "click", "none", readout=("pooled",), pooled_units=5), pack(histories())
    got = model.encode(batch, ["click"])["click"]
    units = F.gelu(task.memories["pooled"].linear(torch.cat(model.backbone(batch)[:2], 1)))
    for user, (first, last) in enumerate(zip(batch.offsets, batch.offsets[1:])):
        want = units[first:last].mean(0) if last > first else torch.zeros(5)
        torch.testing.assert_close(got[user], want)


def test_a_hashed_item_memory_is_the_sum_of_two_signed_rows(model):
    task, batch = add(model, "click", "none", **KINDS["hashed"]), pack(histories())
    table = task.memories["item_memory"].table
    assert table.shape == (7, 16)
    index, sign = hashed_rows(torch.arange(V + 1), 7)
    items = (table[index] * sign[:, :, None]).sum(1)
    got = model.encode(batch, ["click"])["click"]
    read, offsets = batch.whole
    for user, (first, last) in enumerate(zip(offsets, offsets[1:])):
        rows = items[read[first:last].long()]
        torch.testing.assert_close(got[user], rows.sum(0) / max(1, len(rows)) ** 0.5)


def test_a_table_is_hashed_where_it_may_not_have_a_row_for_each_id():
    """Ids are 0 to V."""
    assert len(ItemMemory(9, 2, 0.0, rows=10).table) == 10
    assert not ItemMemory(9, 2, 0.0, rows=10).hashed
    assert ItemMemory(10, 2, 0.0, rows=10).hashed


@pytest.mark.parametrize("kind", ["whole", "hashed", "pooled"])
def test_events_are_left_out_while_a_task_learns(model, kind):
    """Users of one event each: it is there, a third heavier, or all of it is not."""
    options = {"whole": {"readout": ("item_memory",)}, **KINDS}[kind]
    add(model, "click", "none", item_dropout=0.25, **options)
    batch = pack([[7]] * 400)
    whole = model.encode(batch, ["click"])["click"]
    learning = model.train().encode(batch, ["click"])["click"]
    kept = learning.any(1)
    assert 260 < kept.sum() < 340
    torch.testing.assert_close(learning[kept], whole[kept] / 0.75)


def test_hashed_rows_are_even_distinct_and_always_the_same():
    index, sign = hashed_rows(torch.arange(50_001), 1_000)
    assert index.shape == sign.shape == (50_001, 2)
    counts = torch.bincount(index.flatten(), minlength=1_000)
    assert (counts - 100).abs().max() < 50  # a deviation of 10
    assert sign.double().mean(0).abs().max() < 0.02
    assert abs((sign[:, 0] == sign[:, 1]).double().mean() - 0.5) < 0.02
    assert len(torch.unique(index.sort(1).values, dim=0)) > 46_000  # of 500,500 pairs
    assert index[1].tolist() == hashed_rows(torch.tensor([1], dtype=torch.int32), 1_000)[0][0].tolist()
    assert index[:3].tolist() == [[767, 850], [839, 222], [373, 45]]
    assert sign[:3].tolist() == [[1, -1]] * 3


def test_what_a_task_reads_of_others_is_their_frozen_readout_weighted_by_the_user(model):
    task, batch = add(model, "click", "none", readout=("earlier",), earlier_units=4), pack(histories())
    assert task.depends_on == ["rank", "age"]
    memory, values = task.memories["earlier"], []
    for name, project in zip(task.depends_on, memory.values):
        other = model.task(name)
        values.append(project((model.encode(batch, [name])[name] - other.shift) * other.scale))
    newest = model.backbone(batch)[-1][batch.last_rows] * (torch.tensor(LENGTHS) > 0)[:, None]
    weights = (memory.query(newest) @ memory.keys.T / 2).softmax(1)
    assert weights.std(0).min() > 0.01  # users differ
    want = weights[:, :1] * values[0] + weights[:, 1:] * values[1]
    torch.testing.assert_close(model.encode(batch, ["click"])["click"], want)


def test_without_earlier_tasks_there_is_nothing_to_read(model):
    for name in ("rank", "age"):
        model.remove_task(name)
    add(model, "click", "none", readout=("last", "earlier"), earlier_units=4)
    assert not model.encode(pack(histories()), ["click"])["click"][:, 16:].any()


def test_a_task_that_is_read_for_good_is_not_removed_before_its_reader(model):
    add(model, "click", "none", **KINDS["earlier"])
    model.freeze_task("click")
    with pytest.raises(ValueError, match="task 'age' is read by: click; remove them first"):
        model.remove_task("age")
    model.remove_task("click")
    model.remove_task("age")
    assert model.task_names == ["rank"]


def test_a_reader_without_its_sources_is_refused(model):
    config = MemoryConfig(placement="none", readout=("earlier",))
    with pytest.raises(ValueError, match="task 'click' reads task 'gone', which is not there"):
        model.add_task(SPECS["click"], config, closed=True, depends_on=["gone"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contextual": "texts", "prompt_len": 0}, "contextual 'texts' needs a prompt to act on, got prompt_len 0"),
        ({"contextual": "prompts", "placement": "none"}, "needs a tail or a prefix to act on, got placement 'none'"),
        ({"contextual": "texts", "placement": "layers"}, "needs a tail or a prefix to act on, got placement 'layers'"),
        ({"readout": ("earlier",)}, "reads histories without prompts, got placement 'tail'"),
        ({"low_rank": 2, "placement": "both"}, "reads histories without a prefix, got placement 'both'"),
        ({"low_rank": 2, "placement": "layers"}, "reads histories without a prefix, got placement 'layers'"),
        ({"item_rows": 1}, "item_rows must be a whole number from 2 up"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**options)


@pytest.mark.parametrize("name", ["click", "age", "value"])
@pytest.mark.parametrize("item_width", [1, 4])
def test_closing_averages_members_into_one_small_memory(name, item_width):
    model = make_model()
    model.remove_task("age")
    readout = ("item_memory", "mean", "pooled", "last")
    task = add(model, name, "tail", readout=readout, item_width=item_width, pooled_units=5, members=3)
    with torch.no_grad():
        task.shift[task.fixed] = 0.5
        task.scale[task.fixed] = 2.0
        for part in (task, *task.others) if name == "value" else ():
            part.head.unit.copy_(torch.tensor([100.0, 7.0]))
    batch = pack(histories())
    before, each = model(batch, name), model.member_outputs(batch, name)
    torch.testing.assert_close(before, torch.stack(each).mean(0))
    assert (each[0] - each[1]).abs().max() > 0.1
    model.freeze_task(name)
    torch.testing.assert_close(model(batch, name), before, rtol=1e-4, atol=1e-5)
    outputs = 3 if name == "age" else 1
    assert task.memories["item_memory"].table.shape == (V + 1, min(outputs, 3 * item_width))
    assert task.memories["pooled"].linear.weight.shape == (15, 32)
    assert len(model.member_outputs(batch, name)) == 1


def test_each_member_learns_from_a_loss_of_its_own(model):
    task = add(model, "click", "none", readout=("item_memory",), members=2)
    outputs = model.member_outputs(pack(histories()), "click")
    outputs[1].square().sum().backward()
    assert task.others[0].memories["item_memory"].table.grad.any()
    assert task.memories["item_memory"].table.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_head_parameters_are_all_of_a_task(model, kind):
    task = add(model, "click", "none", **KINDS[kind])
    parts = [*task.memory_parameters(), *task.head_parameters()]
    assert sorted(map(id, parts)) == sorted(map(id, task.parameters()))


@pytest.mark.parametrize(("classes", "width"), [(3, 16), (8, 16), (21, 42)])
def test_an_item_memory_can_tell_many_classes_apart(classes, width):
    task = make_model().add_task(TaskSpec("occupation", "classes", num_classes=classes), MemoryConfig())
    assert task.memories["item_memory"].table.shape == (V + 1, width)
    task.fit_head(torch.zeros(4, len(task.fixed)), torch.tensor([0, 1, 2, 0]))
    task.close()
    assert task.memories["item_memory"].table.shape == (V + 1, classes)


@pytest.mark.parametrize(
    ("name", "settings", "want"),
    [
        ("click", {}, 0.8),
        ("click", {"readout": ("item_memory",)}, 0.8),
        ("click", {"readout": ("last", "mean")}, 0.5),
        ("age", {"readout": ("last",), "dropout": 0.1}, 0.1),
        ("rank", {"tied": True}, 0.8),
        ("rank", {"tied": False, "dropout": 0.0}, 0.0),
    ],
)
def test_states_without_an_item_memory_beside_them_are_left_out_less_often(model, name, settings, want):
    task = model.add_task(replace(SPECS[name], name="new"), MemoryConfig(**settings))
    assert task.dropout.p == want
