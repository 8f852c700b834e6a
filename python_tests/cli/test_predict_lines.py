"""What `pcl predict` reads from stdin: lists and objects, in any pieces; each line has its answer, in order."""

import json
import os
import select
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pcl_ext import store
from pcl_ext.serve import lines as lines_module

THREE = [[1, 2], [], [4] * 30]


@pytest.fixture
def predict(made, pcl):
    """`pcl predict`: (exit status, answers, lines on stderr)."""

    def call(task, stdin, *options):
        status, out, err = pcl("predict", made.run, "--task", task, *options, stdin=stdin)
        return status, [json.loads(line) for line in out], err

    return call


@pytest.mark.parametrize(("between", "last"), [("\n", ""), ("\n", "\n"), ("\r\n", "\r\n")], ids=repr)
@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_predict_takes_lines_as_they_come(made, pcl, monkeypatch, size, between, last):
    monkeypatch.setattr(lines_module, "READ_BYTES", size)
    lines = between.join(map(json.dumps, THREE)) + last
    status, out, err = pcl("predict", made.run, "--task", "next", stdin=lines)
    assert (status, err) == (0, [])
    want = store.from_pretrained(made.run).predict(THREE, "next")
    assert [json.loads(line)["items"] for line in out] == [row["items"] for row in want]


def test_predict_answers_a_pipe_that_stays_open(made):
    argv = [sys.executable, "-m", "pcl_ext.cli", "predict", made.run, "--task", "click"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for lines in (1, 1, 3):
            os.write(process.stdin.fileno(), b"[1, 2]\n" * lines)
            answers = b""
            while answers.count(b"\n") < lines:
                if not select.select([process.stdout], [], [], 60)[0]:
                    process.kill()
                    pytest.fail("no answer")
                came = os.read(process.stdout.fileno(), 1 << 16)
                assert came, "the process has ended"
                answers += came
            assert [set(json.loads(line)) for line in answers.splitlines()] == [{"probability"}] * lines
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_blank_lines_have_no_answer_and_count_as_lines(predict, monkeypatch, chunk):
    monkeypatch.setattr(lines_module, "LINES", chunk)
    _, want, _ = predict("click", "[1]\n[2]\n")
    assert predict("click", "\n\n[1]\n \t\r\n[2]\n\n") == (0, want, [])
    assert predict("click", "\n\n") == (0, [], [])
    status, answers, err = predict("click", "[1]\n\nx\n")
    assert (status, answers) == (2, want[:1])
    assert "line 3 must be a JSON list of item ids" in err[-1]


def test_ids_of_the_log_are_told_what_they_need(predict):
    assert predict("click", '["sku-1"]\n')[2][-1].endswith(
        "; the ids of a log need --item-ids, the items.parquet of the dataset"
    )
    assert "--item-ids" not in predict("click", "[1.5]\n")[2][-1]


@pytest.mark.parametrize("task", ["next", "segment"])
def test_an_objects_other_keys_come_back_with_its_answer(predict, task):
    _, want, _ = predict(task, "[1, 2]\n[]\n[3]\n")
    own = [{"user": "ann", "at": [1, {"x": None}]}, {}, {"user": 7}]
    lines = [own[0] | {"items": [1, 2]}, {"items": []}, {"items": [3]} | own[2]]
    status, got, err = predict(task, "".join(json.dumps(line) + "\n" for line in lines))
    assert (status, err) == (0, [])
    assert got == [keys | answer for keys, answer in zip(own, want, strict=True)]
    assert list(got[0])[:2] == ["user", "at"]


def test_an_object_may_hold_the_logs_own_ids(made, predict, tmp_path):
    table = pa.table({"item_id": range(1, 51), "original_id": [f"sku-{item}" for item in range(1, 51)]})
    pq.write_table(table, tmp_path / "items.parquet")
    line = '{"items": ["sku-1", "new"], "user": "ann"}\n'
    status, (got,), err = predict("next", line, "--item-ids", tmp_path / "items.parquet")
    assert (status, err) == (0, ["pcl predict: 1 unknown item ids were dropped from 1 histories"])
    (want,) = store.from_pretrained(made.run).predict([[1]], "next")
    assert (got["user"], got["items"]) == ("ann", [f"sku-{item}" for item in want["items"]])


@pytest.mark.parametrize("key", ["scores", "class", "label", "probabilities", "probability", "value"])
def test_a_key_of_the_answers_is_refused(predict, key):
    status, answers, err = predict("click", f'[1]\n{{"items": [1], "{key}": 3}}\n')
    assert (status, len(answers)) == (2, 1)
    assert err == [f"pcl predict: line 2: the key '{key}' is one of an answer; give it another name"]
