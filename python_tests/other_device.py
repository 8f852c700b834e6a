"""Everything a user does with a model, on the CPU and on another device: the same comes out, and no step mixes devices.

`python other_device.py FOLDER DEVICE [CHECK...]` writes {check: "" or what went wrong} as JSON to stdout, of all checks
or of those named. DEVICE is cuda, or stand_in, which needs no accelerator.
"""

import contextlib
import copy
import importlib
import json
import pickle
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import BACKBONE

from pcl_ext import PackedBatch, checkpoint, cli, infer, loop, run, store
from pcl_ext.data import Dataset, synthetic
from pcl_ext.export import export
from pcl_ext.model import BackboneConfig, MemoryConfig
from pcl_ext.serve import Predictor
from pcl_ext.train import LearnConfig, PretrainConfig, learn_task, pretrain

FOLDER, DEVICE = Path(sys.argv[1]), sys.argv[2]
PRETRAIN = PretrainConfig(epochs=1, batch_tokens=300, learning_rate=1e-3)
LEARN = LearnConfig(epochs=1)
HISTORIES = [[3, 17, 4], [], [9, 9, 1, 30, 2, 8], [5]]


def same(one, other, rtol=2e-3, atol=2e-4):
    torch.testing.assert_close(one.cpu(), other.cpu(), rtol=rtol, atol=atol)


def batch(model):
    shape = model.backbone.config
    return PackedBatch.from_lists(HISTORIES, num_items=shape.num_items, max_len=shape.max_len)


def on_both(model, learn):
    """`learn` on the model and on a copy of it on the device -> both."""
    other = copy.deepcopy(model).to(DEVICE)
    for each in (model, other):
        learn(each)
    return model, other


def check_pretrain(dataset, folder, **settings):
    shape, config = BackboneConfig(dataset.num_items, **BACKBONE, dropout=0.0), replace(PRETRAIN, **settings)
    models = [pretrain(dataset, shape, config, device=device)[0] for device in ("cpu", DEVICE)]
    assert models[1].device.type == DEVICE
    tensors = [model.state_dict() for model in models]
    for name, value in tensors[0].items():
        same(tensors[1][name], value)


def check_sample(check, dataset, folder, **given):
    """The softmax over a sample of the items. Of the stand-in PyTorch has no sparse tensors: gradients are dense."""
    dense = mock.patch.object(torch.nn.functional, "embedding", lambda ids, table, **_: table[ids])
    with dense if DEVICE == "stand_in" else contextlib.nullcontext():
        check(dataset, folder, full_softmax=10, negatives=20, **given)


def check_learn(dataset, folder, task, memory=None, **settings):
    model = store.from_pretrained(folder / "run")
    memory = MemoryConfig(dropout=0.0, item_dropout=0.0, **(memory or {}))
    model, other = on_both(model, lambda m: learn_task(m, dataset, task, replace(LEARN, **settings), memory))
    assert {tensor.device.type for tensor in other.state_dict().values()} == {DEVICE}
    same(other(batch(model).to(DEVICE), task), model(batch(model), task))
    scores = [infer.evaluate(m, dataset, [task])[task] for m in (model, other)]
    assert abs(scores[0].loss - scores[1].loss) < 1e-3


def check_bfloat16(dataset, folder):
    """Of the stand-in PyTorch has no autocast."""
    shape = BackboneConfig(dataset.num_items, **BACKBONE, dropout=0.0)
    curves = [pretrain(dataset, shape, replace(PRETRAIN, precision=p), device=DEVICE)[1] for p in PRECISIONS]
    assert abs(curves[0][-1]["loss"] - curves[1][-1]["loss"]) < 0.05


def check_mixed_tasks(dataset, folder):
    model = store.from_pretrained(folder / "run")
    other, index = copy.deepcopy(model).to(DEVICE), torch.tensor([0, 2, 1, 2])
    outputs = [m(batch(m).to(m.device), task_index=index) for m in (model, other)]
    for name, (rows, output) in outputs[0].items():
        same(outputs[1][name][0], rows)
        same(outputs[1][name][1], output)
    vectors = [m.encode(batch(m).to(m.device)) for m in (model, other)]
    for name, value in vectors[0].items():
        same(vectors[1][name], value)


def check_predict(dataset, folder):
    model = store.from_pretrained(folder / "run")
    other = copy.deepcopy(model).to(DEVICE)
    for task in model.task_names:
        for one, two in zip(model.predict(HISTORIES, task, k=3), other.predict(HISTORIES, task, k=3)):
            for key, value in one.items():
                same(torch.tensor(two[key], dtype=torch.float64), torch.tensor(value, dtype=torch.float64))


def check_predictor(dataset, folder):
    here, there = (Predictor(folder / "run", device=torch.device(device)) for device in ("cpu", DEVICE))
    there = pickle.loads(pickle.dumps(there))  # as a worker gets it
    for task in store.from_pretrained(folder / "run").task_names:
        for one, two in zip(here.predict(HISTORIES, task).values(), there.predict(HISTORIES, task).values()):
            same(torch.as_tensor(two), torch.as_tensor(one))
    for one, two in zip(here.encode(HISTORIES).values(), there.encode(HISTORIES).values()):
        same(torch.as_tensor(two), torch.as_tensor(one))
    assert there.model.device.type == DEVICE


def check_export(dataset, folder):
    there = store.from_pretrained(folder / "run").to(DEVICE)
    with pytest.raises(ValueError, match="exported from the CPU, this one is on"):
        export(there, "loyal", folder / "exported")
    assert not (folder / "exported").exists()


def check_user_state(dataset, folder):
    shape = BackboneConfig(dataset.num_items, **BACKBONE, positions="rotary")
    model = pretrain(dataset, shape, PRETRAIN)[0]
    other, answers = copy.deepcopy(model).to(DEVICE), []
    for m in (model, other):
        state = m.user_state(batch(m))
        state.extend(batch(m).to(m.device))
        answers.append(m(state, "next"))
    same(answers[1], answers[0])


def check_resumed(train, dataset, folder):
    """A training that is interrupted before its last step goes on with that one, there and on the other device."""
    path = folder / "resumed.safetensors"
    with steps() as whole:
        wanted = train(dataset, folder, None, "cpu")
    for began, goes_on in (("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)):
        path.unlink(missing_ok=True)
        with steps(most=len(whole) - 1), contextlib.suppress(KeyboardInterrupt):
            train(dataset, folder, path, began)
        with steps() as left:
            same(train(dataset, folder, path, goes_on), wanted)
        assert len(left) == 1


@contextlib.contextmanager
def steps(most=None, step=loop._step):
    """Inside, a checkpoint follows every step, and who takes more than `most` is interrupted; the losses so far."""
    losses = []

    def run_step(*args):
        if len(losses) == most:
            raise KeyboardInterrupt
        losses.append(step(*args))
        return losses[-1]

    with mock.patch.object(loop, "_step", run_step), mock.patch.object(checkpoint, "_PAUSE", 0):
        yield losses


def train_backbone(dataset, folder, path, device):
    shape = BackboneConfig(dataset.num_items, **BACKBONE, dropout=0.0)
    config = replace(PRETRAIN, epochs=2, checkpoint_seconds=0.0)
    return pretrain(dataset, shape, config, path, device=device)[0].backbone.table


def train_task(dataset, folder, path, device):
    model = store.from_pretrained(folder / "run").to(device)
    config, memory = replace(LEARN, epochs=2, checkpoint_seconds=0.0), MemoryConfig(dropout=0.0, item_dropout=0.0)
    learn_task(model, dataset, "click", config, memory, path)
    return model(batch(model).to(device), "click")


def check_command(dataset, folder):
    """`pcl` trains, encodes and predicts there; it measures on the CPU, and so proves that nothing was forgotten."""
    out, where = str(folder / "there"), ["--device", DEVICE]
    settings = ["--pretrain.epochs", "1", "--backbone.dim", "16", "--max-len", "20", *where]
    assert cli.main(["pretrain", str(dataset.path), "--out", out, *settings]) == 0
    assert cli.main(["learn", out, "click", "--data", str(dataset.path), "--learn.epochs", "1", *where]) == 0
    assert cli.main(["verify", out]) == 0
    for command in (["encode", out], ["predict", out, "--task", "click"]):
        file = str(folder / f"{command[0]}.parquet")
        assert cli.main([*command, "--data", str(dataset.path), "--out", file, *where]) == 0


PRECISIONS = ("float32", "bfloat16")
LOW_RANK = {"low_rank": 2, "readout": ("last", "pooled", "item_memory"), "item_rows": 8}
CHECKS = {
    "pretrain": check_pretrain,
    "pretrain over a sample": partial(check_sample, check_pretrain),
    "binary": partial(check_learn, task="click"),
    "regression": partial(check_learn, task="spend"),
    "cold items": partial(check_learn, task="range"),
    "items over a sample": partial(check_sample, check_learn, task="range", ridge=()),
    "repeats": partial(check_learn, task="again"),
    "repeats over a sample": partial(check_sample, check_learn, task="again"),
    "prefix and members": partial(check_learn, task="click", memory={"placement": "both", "members": 2}),
    "contextual": partial(check_learn, task="click", memory={"contextual": "prompts"}),
    "low rank": partial(check_learn, task="click", memory=LOW_RANK),
    "mixed tasks": check_mixed_tasks,
    "predict": check_predict,
    "predictor": check_predictor,
    "export": check_export,
    "user state": check_user_state,
    "pretrain resumed": partial(check_resumed, train_backbone),
    "learn resumed": partial(check_resumed, train_task),
    "command": check_command,
}


def prepare(folder):
    """A dataset, and a run with tasks of the kinds that others build on."""
    synthetic.prepare(folder / "shop", num_users=80, num_items=50, mean_length=8)
    write_repeats(Dataset(folder / "shop"))
    dataset = Dataset(folder / "shop")
    run.pretrain(dataset, folder / "run", BACKBONE, PRETRAIN)
    for task in ("loyal", "segment"):
        run.learn(folder / "run", dataset, task, LEARN)
    return dataset


def write_repeats(dataset):
    """An items task whose targets may be in the history."""
    spec = {"name": "again", "kind": "items", "description": "", "metric": "mrr@5", "repeats": True}
    (dataset.path / "tasks" / "again.json").write_text(json.dumps(spec))
    lengths = np.diff(dataset.offsets)
    long = lengths >= 3
    last = dataset.offsets[1:][long] - 1
    columns = {"user_id": dataset.user_id[long], "target": dataset.items[last], "cut": lengths[long] - 1}
    pq.write_table(pa.table(columns), dataset.path / "tasks" / "again.parquet")


def main():
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # some systems' settings ask for less
    if DEVICE == "stand_in":
        importlib.import_module(DEVICE)
    else:
        CHECKS["bfloat16"] = check_bfloat16
    dataset, found = prepare(FOLDER), {}
    for name in sys.argv[3:] or CHECKS:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                CHECKS[name](dataset, FOLDER)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
