"""What a service of weeks asks: many threads, a run that is saved anew while it is read, workers by fork."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from stores import add, make_model

from pcl_ext import Predictor, save_pretrained, store

TASKS = ["next", "range_b", "ctr", "age", "spend"]
HISTORIES = [[1, 2, 3], [], [5] * 9, [20, 99, 7, -1], [0]]


@pytest.fixture
def run(tmp_path):
    save_pretrained(make_model(*TASKS), tmp_path / "run")
    return tmp_path / "run"


def learn_anew(run, seed):
    model = store.from_pretrained(run)
    model.remove_task("ctr")
    new = make_model("ctr", seed=seed).task("ctr")
    add(model, "ctr")
    model.task("ctr").load_state_dict(new.state_dict())
    save_pretrained(model, run)


def probability(run):
    return Predictor(run, "ctr")(HISTORIES)["probability"]


@pytest.fixture
def opened(monkeypatch):
    """Tasks of each opening of a run, which takes its time."""
    calls, real = [], store.from_pretrained

    def slow(path, tasks=None):
        calls.append(tasks)
        time.sleep(0.05)
        return real(path, tasks)

    monkeypatch.setattr(store, "from_pretrained", slow)
    return calls


def test_threads_open_a_run_once_and_all_get_their_task(run, opened):
    predictor, start = Predictor(run, "ctr"), threading.Barrier(8)

    def ask(number):
        start.wait()
        return [predictor.predict(HISTORIES, task)["unknown"] for task in ("ctr", TASKS[number % 5])]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert opened == [("ctr",), None]


def test_threads_get_the_bits_of_one(run):
    predictor, start = Predictor(run), threading.Barrier(8)
    ask = [lambda task=task: predictor.predict(HISTORIES, task, k=4) for task in TASKS]
    ask.append(lambda: predictor.encode(HISTORIES))
    want = [one() for one in ask]

    def go(number):
        start.wait()
        return [ask[(number + place) % 6]() for place in range(12)]

    with ThreadPoolExecutor(8) as pool:
        for number, answers in enumerate(pool.map(go, range(8))):
            for place, answer in enumerate(answers):
                for name, values in want[(number + place) % 6].items():
                    np.testing.assert_array_equal(answer[name], values)


class SlowCount(Predictor):
    """Between reading the count and writing it others have their turn."""

    @property
    def unknown(self):
        count = self.__dict__["unknown"]
        time.sleep(0.01)
        return count

    @unknown.setter
    def unknown(self, count):
        self.__dict__["unknown"] = count


def test_threads_count_every_unknown_id(run):
    predictor = SlowCount(run)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: predictor.predict(HISTORIES, "ctr"), range(16)))
    assert predictor.unknown == 3 * 16


def test_a_run_saved_anew(run):
    predictor, late = Predictor(run), Predictor(run)
    assert predictor.is_current()
    before = predictor.predict(HISTORIES, "ctr")["probability"]
    learn_anew(run, seed=1)
    assert not predictor.is_current()
    np.testing.assert_array_equal(predictor.predict(HISTORIES, "ctr")["probability"], before)
    assert (late.predict(HISTORIES, "ctr")["probability"] != before).any()
    assert late.is_current()


@pytest.mark.parametrize("seen", ["old", "swept"])
def test_a_run_saved_anew_while_it_is_opened(run, monkeypatch, seen):
    """What is opened is whole and of the manifest that it says."""
    real, left = store.from_pretrained, [1]

    def saved_meanwhile(path, tasks=None):
        model = real(path, tasks)
        if left:
            seed = left.pop()
            learn_anew(run, seed)
            if seen == "swept":
                raise store.StoreError("is missing")
        return model

    before, predictor = probability(run), Predictor(run, "ctr")
    monkeypatch.setattr(store, "from_pretrained", saved_meanwhile)
    got = predictor(HISTORIES)["probability"]
    assert predictor.is_current()
    assert (got != before).any()
    np.testing.assert_array_equal(got, probability(run))


def test_a_file_that_is_missing_is_told(run):
    next((run / "tasks").glob("ctr-*")).unlink()
    with pytest.raises(store.StoreError, match="is missing"):
        probability(run)


def test_names_of_tasks(run, monkeypatch):
    monkeypatch.setattr("pcl_ext.serve.predictor.BATCH_TOKENS", 4)
    predictor = Predictor(run)
    vectors = predictor.encode(HISTORIES, iter(["age", "ctr"]))
    assert {name: len(values) for name, values in vectors.items()} == {"age": 5, "ctr": 5}
    for wrong in (5, "age", b"age"):
        with pytest.raises(TypeError, match="tasks must be a list of names, got the"):
            predictor.encode(HISTORIES, wrong)


WORKERS = """
import os, signal, sys
import numpy as np, torch
from pcl_ext import Predictor
torch.set_num_threads(int(sys.argv[2]))
predictor, histories = Predictor(sys.argv[1]), [[1, 2, 3] * 50] * 2000
ask = lambda: [predictor.predict(histories, task) for task in ("next", "age")]
want, workers = ask(), []
for _ in range(2):
    worker = os.fork()
    if not worker:
        signal.alarm(60)
        torch.set_num_threads(1)
        same = [np.array_equal(got[name], one[name]) for got, one in zip(ask(), want) for name in one]
        os._exit(not all(same))
    workers.append(worker)
sys.exit(any(os.waitpid(worker, 0)[1] for worker in workers))
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_workers_that_are_forked_answer_from_the_model_that_was_opened_before(run, threads):
    subprocess.run([sys.executable, "-c", WORKERS, str(run), threads], check=True, timeout=150)
