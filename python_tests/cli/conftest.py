"""A dataset and a run made by the command line, and ways to call it."""

import io
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from runs import write_dataset

from pcl_ext.cli import main

SETTINGS = """\
max_len: 20
backbone: {dim: 16, num_heads: 1}
pretrain: {epochs: 2, batch_tokens: 600}
"""
MEMORY = """\
placement: both
prompt_len: 2
memory: {readout: [last, mean], contextual: texts}
learn: {epochs: 2, head_rate: 0.01}
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A dataset and a run that knows a task of every kind, both made by the command line."""
    folder, threads = tmp_path_factory.mktemp("cli"), torch.get_num_threads()
    torch.set_num_threads(1)
    data, run = str(write_dataset(folder / "data")), str(folder / "run")
    (folder / "pretrain.yaml").write_text(SETTINGS)
    (folder / "learn.yaml").write_text(MEMORY)
    assert main(["pretrain", data, "--out", run, "--config", str(folder / "pretrain.yaml")]) == 0
    first = ["--config", str(folder / "learn.yaml"), "--prompt-len", "3"]
    others = ["--learn.epochs", "1", "--placement", "prefix"]
    assert main(["learn", run, "click", "--data", data, *first]) == 0
    assert main(["learn", run, "segment", "spend", "range", "--data", data, *others]) == 0
    torch.set_num_threads(threads)
    return SimpleNamespace(data=data, run=run, folder=folder)


@pytest.fixture
def pcl(capsys, monkeypatch):
    """Run a command: (exit status, lines on stdout, lines on stderr)."""
    torch.set_num_threads(1)

    def call(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def refused(pcl):
    """Run a command that must fail with status 2 and one line on stderr, nothing else; -> the line."""

    def call(*argv, stdin=""):
        status, out, err = pcl(*argv, stdin=stdin)
        assert (status, out, len(err)) == (2, [], 1), (status, out, err)
        return err[0]

    return call


@pytest.fixture
def copy(made, tmp_path):
    """A run of one's own, to spoil."""
    return shutil.copytree(made.run, tmp_path / "copy")
