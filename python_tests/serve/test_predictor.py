"""A Predictor answers as the model does, whatever the form, the chunks and the process."""

import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from stores import SPECS, make_model

from pcl_ext import PackedBatch, Predictor, TaskSpec, save_pretrained
from pcl_ext.model import top_items
from pcl_ext.serve import as_rows, inputs

TASKS = ["next", "range_b", "ctr", "age", "spend"]
HISTORIES = [[1, 2, 3], [], [5] * 9, [20, 99, 7, -1], [11, 8, 15, 16, 2, 3, 4, 8], [0]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "run"
    save_pretrained(make_model(*TASKS), path)
    return path


@pytest.fixture(params=[16, 1 << 14], ids=["chunks", "at once"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(inputs, "BATCH_TOKENS", request.param)
    monkeypatch.setattr("pcl_ext.serve.predictor.BATCH_TOKENS", request.param)
    monkeypatch.setattr(top_items, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_the_models(run, task):
    predictor = Predictor(run)
    with pytest.warns(UserWarning, match="3 unknown item ids"):
        want = predictor.model.predict(HISTORIES, task, k=3)
    answer = predictor.predict(HISTORIES, task, k=3)
    assert answer.pop("unknown").tolist() == [0, 0, 0, 2, 0, 1]
    assert predictor.unknown == 3
    assert {len(values) for values in answer.values()} == {len(HISTORIES)}
    for got, row in zip(as_rows(answer), want, strict=True):
        assert got.keys() == row.keys()
        for name, value in row.items():
            torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(value))


@pytest.mark.usefixtures("_chunks")
def test_vectors_are_the_models(run):
    predictor = Predictor(run)
    got = predictor.encode(pa.table({"items": HISTORIES}))
    batch = PackedBatch.from_lists(HISTORIES, num_items=20, max_len=6)
    with torch.no_grad():
        want = predictor.model.encode(batch)
    assert list(got) == TASKS
    for task in TASKS:
        torch.testing.assert_close(torch.from_numpy(got[task]), want[task])
    assert list(predictor.encode(HISTORIES, ["age", "ctr"])) == ["age", "ctr"]


@pytest.mark.parametrize("task", TASKS)
def test_no_histories_no_answers(run, task):
    answer = Predictor(run).predict([], task, k=2)
    assert all(len(values) == 0 for values in answer.values())
    assert "items" not in answer or answer["items"].shape == (0, 2)
    assert as_rows(answer) == []


def scores_of(model, task, histories):
    with torch.no_grad():
        return model(PackedBatch.from_lists(histories, num_items=20, max_len=6), task)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("skip_seen", [False, True])
@pytest.mark.parametrize("task", ["next", "range_b"])
def test_every_rank_is_exact(run, task, skip_seen):
    """k as large as the catalogue: a full sort of the scores, seen items last or gone."""
    predictor = Predictor(run)
    part = predictor.model.task(task)
    got = predictor.predict(HISTORIES, task, k=50, skip_seen=skip_seen)
    scores = scores_of(predictor.model, task, HISTORIES)
    for row, history in enumerate(HISTORIES):
        pairs = [(-s, i) for s, i in zip(scores[row].tolist(), part.catalogue.tolist())]
        want = [i for _, i in sorted(pairs) if not skip_seen or i not in history]
        assert got["items"][row].tolist() == want + [0] * (len(pairs) - len(want))
        assert np.isneginf(got["scores"][row][len(want) :]).all()
    assert [len(row["items"]) for row in as_rows(got)] == [(got["items"][r] > 0).sum() for r in range(len(HISTORIES))]


def test_the_whole_history_was_seen(run):
    """max_len is 6: what lies before is not read, but it was seen."""
    history = [9, 1, 2, 3, 4, 5, 6]
    assert 9 not in Predictor(run).predict([history], "next", k=20, skip_seen=True)["items"]
    got = Predictor(run).predict([[20, 19], history, [9, 8] * 4], "next", k=20)["items"]
    assert set(got[1][-7:]) == set(history)
    assert set(got[2][-2:]) == {9, 8}


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_equal_scores_go_to_the_lowest_id(monkeypatch, chunk, k):
    """Scores of few values, a catalogue in any order, offered in any pieces."""
    items = torch.randperm(100)[:60] + 1
    scores = torch.randint(-2, 2, (5, 60)).float()
    scores[0] = -torch.inf
    scores[1, ::2] = -0.0
    best = top_items.TopItems(5, k)
    for part in torch.arange(60).split(max(1, chunk // 5)):
        best.offer(scores[:, part], items[part])
    for row in range(5):
        pairs = sorted(zip((-scores[row]).tolist(), items.tolist()))[:k]
        assert best.items[row].tolist() == [0 if row == 0 else i for _, i in pairs]
        assert best.scores[row].tolist() == [-s for s, _ in pairs]


def test_a_score_that_is_nan_raises():
    with pytest.raises(FloatingPointError, match="a score is NaN"):
        top_items.TopItems(1, 2).offer(torch.tensor([[1.0, torch.nan, 2.0]]), torch.arange(1, 4))


def test_targets_that_repeat(tmp_path):
    """Votes of the history for its own items reach the right columns of every chunk."""
    model = make_model()
    SPEC = TaskSpec("again", "items", repeats=True, catalogue=(19, 2, 5, 7, 11, 3))
    task = model.add_task(SPEC)
    for parameter in task.parameters():
        parameter.data.normal_()
    model.freeze_task("again")
    save_pretrained(model, tmp_path / "run")
    histories = [[2, 2, 5], [], [7, 1, 19, 3]]
    scores = scores_of(model.eval(), "again", histories)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_items, "_CHUNK", 1)
        got = Predictor(tmp_path / "run").predict(histories, "again", k=2)
    best = scores.topk(2)
    torch.testing.assert_close(torch.from_numpy(got["scores"]), best.values)
    assert got["items"].tolist() == task.catalogue[best.indices].tolist()


def test_called_it_does_what_it_was_made_for(run):
    table = pa.table({"user_id": [7, 8], "items": [[1, 2], [3]], "name": ["a", "b"]})
    answer = Predictor(run, "ctr", keep=["user_id"])(table)
    assert list(answer) == ["user_id", "probability", "unknown"]
    assert answer["user_id"].tolist() == [7, 8]
    batch = {"user_id": np.array([7, 8]), "seen": np.array([np.array([1, 2]), np.array([3])], dtype=object)}
    vectors = Predictor(run, encode=["age"], keep=["user_id"], column="seen")(batch)
    assert list(vectors) == ["user_id", "age"]
    assert vectors["age"].dtype == np.float32
    items = Predictor(run, "next", k=2, skip_seen=True)([[1]])
    assert items["items"].shape == (1, 2)
    assert 1 not in items["items"]


def answer_elsewhere(predictor, queue):
    queue.put((predictor._opened is None, predictor([[1, 2], []])["probability"]))


@pytest.mark.slow
def test_it_opens_the_run_in_each_process(run):
    predictor = Predictor(run, "ctr")
    want = predictor([[1, 2], []])["probability"]
    assert pickle.loads(pickle.dumps(predictor))._opened is None
    assert len(pickle.dumps(predictor)) < 1000
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=answer_elsewhere, args=(predictor, queue))
    process.start()
    fresh, got = queue.get(timeout=120)
    process.join()
    assert fresh
    np.testing.assert_array_equal(got, want)


def test_pickled_it_is_its_settings(run):
    predictor = Predictor(run, "next", k=3)
    want = predictor(HISTORIES)
    data = pickle.dumps(predictor)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again._opened is None
    for name, values in again(HISTORIES).items():
        np.testing.assert_array_equal(values, want[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "churn"}, "task must be one of next, range_b, ctr, age, spend, got 'churn'"),
        ({"encode": ["ctr", "churn"]}, "got 'churn'"),
        ({"encode": "ctr"}, "must be lists of names, got a str"),
        ({"task": "ctr", "encode": ["ctr"]}, "not both"),
        ({"task": "next", "k": 0}, "k must be at least 1, got 0"),
        ({"task": "next", "k": 2.0}, "k must be a whole number, got 2.0"),
    ],
    ids=str,
)
def test_mistakes_are_told_at_once(run, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Predictor(run, **settings)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json is missing; name the folder of a run"):
        Predictor(tmp_path, "ctr")


def test_calls_that_cannot_be(run):
    with pytest.raises(ValueError, match="needs a task, or encode"):
        Predictor(run)([[1]])
    with pytest.raises(ValueError, match="keep names 'user_id', the batch has no columns"):
        Predictor(run, "ctr", keep=["user_id"])([[1]])
    with pytest.raises(ValueError, match="keep must not name what the answer holds itself, got probability"):
        Predictor(run, "ctr", keep=["probability"])({"items": [[1]], "probability": [1.0]})
    with pytest.raises(ValueError, match="user_id must be as long as the histories, 1, got 2"):
        Predictor(run, "ctr", keep=["user_id"])({"items": [[1]], "user_id": [7, 8]})
    with pytest.raises(ValueError, match="task must be one of"):
        Predictor(run).predict([[1]], "churn")


def test_classes_with_names_are_named(tmp_path):
    model = make_model()
    model.add_task(TaskSpec("age", "classes", num_classes=3, labels=("young", "old", "very old")))
    model.freeze_task("age")
    save_pretrained(model, tmp_path / "run")
    answer = Predictor(tmp_path / "run").predict(HISTORIES, "age")
    assert answer["label"].tolist() == [("young", "old", "very old")[number] for number in answer["class"]]
    with pytest.warns(UserWarning, match="unknown item ids"):
        rows = model.predict(HISTORIES, "age")
    assert [row["label"] for row in rows] == answer["label"].tolist() == [row["label"] for row in as_rows(answer)]
    assert list(rows[0]) == ["class", "label", "probabilities"]


def test_specs_cover_every_kind():
    assert {SPECS[name].kind for name in TASKS} == {"items", "binary", "classes", "regression"}


def test_equal_scores_go_to_the_lowest_id_in_the_model_and_in_the_predictor(tmp_path):
    model = make_model("range_b")
    for value in model.task("range_b").state_dict().values():
        if value.is_floating_point():
            value.zero_()
    save_pretrained(model, tmp_path / "run")
    want = [[3, 7]] * 2
    assert [row["items"] for row in model.predict([[1], []], "range_b", k=2)] == want
    assert Predictor(tmp_path / "run").predict([[1], []], "range_b", k=2)["items"].tolist() == want


def test_a_predictor_for_a_task_opens_that_one_alone_until_another_is_asked_for(run):
    predictor, whole = Predictor(run, TASKS[0]), Predictor(run)
    one, other = (predictor.predict(HISTORIES, task) for task in TASKS[:2])
    for got, task in ((one, TASKS[0]), (other, TASKS[1])):
        want = whole.predict(HISTORIES, task)
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name]) for name in want)
    assert Predictor(run, TASKS[0]).model.task_names == [TASKS[0]]
    assert Predictor(run, encode=TASKS[1:]).model.task_names == TASKS[1:]
    assert list(Predictor(run, encode=TASKS[1:]).encode(HISTORIES)) == TASKS
    predictor.encode(HISTORIES)
    assert predictor.model.task_names == TASKS
    opened = predictor.model
    predictor.encode(HISTORIES)
    predictor.predict(HISTORIES, TASKS[2])
    assert predictor.model is opened
