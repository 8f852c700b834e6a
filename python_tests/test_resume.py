"""A run that was interrupted ends with the same bits as one that never was."""

import dataclasses
import multiprocessing
import random
import shutil

import pytest
import torch
from runs import LEARN, MEMORY, PRETRAIN, TASKS, contents, learn, pretrain, write_dataset

from pcl_ext import baselines, checkpoint, loop, run, store, train
from pcl_ext.data import Dataset, synthetic

PHASES = {"pretrain": pretrain, "learn": learn}
KILLS = 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A dataset and a run over it that was never interrupted: (dataset, run after pretraining, run at the end)."""
    folder = tmp_path_factory.mktemp("whole")
    dataset = write_dataset(folder / "dataset")
    pretrain(dataset, folder / "run")
    shutil.copytree(folder / "run", folder / "pretrained")
    learn(dataset, folder / "run")
    return dataset, folder / "pretrained", folder / "run"


def start(phase, whole, out):
    """A fresh run folder in which `phase` is next, and the run that must come out."""
    dataset, pretrained, complete = whole
    if phase == "learn":
        shutil.copytree(pretrained, out)
    return pretrained if phase == "pretrain" else complete


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 8])
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_stopped_after_any_step_resumes_with_the_same_bits(whole, tmp_path, monkeypatch, phase, stop):
    want = start(phase, whole, tmp_path / "run")
    take, done = loop._step, []

    def interrupted(*args):
        if len(done) == stop:
            raise Interrupted
        done.append(None)
        return take(*args)

    monkeypatch.setattr(loop, "_step", interrupted)
    with pytest.raises(Interrupted):
        PHASES[phase](whole[0], tmp_path / "run")
    monkeypatch.undo()
    PHASES[phase](whole[0], tmp_path / "run")
    assert contents(tmp_path / "run") == contents(want)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_sampled_pretraining_resumes_with_the_same_bits(whole, tmp_path, monkeypatch):
    """Sparse gradients and the optimiser's state of single rows go through a checkpoint, and so do the draws."""
    torch.set_num_threads(1)
    settings = Dataset(whole[0]), {"dim": 16, "num_heads": 1, "max_len": 20}
    config = dataclasses.replace(PRETRAIN, full_softmax=1, negatives=20)
    run.pretrain(settings[0], tmp_path / "whole", settings[1], config)
    take, done = loop._step, []

    def interrupted(*args):
        if len(done) == 5:
            raise Interrupted
        done.append(None)
        return take(*args)

    monkeypatch.setattr(loop, "_step", interrupted)
    with pytest.raises(Interrupted):
        run.pretrain(settings[0], tmp_path / "run", settings[1], config)
    monkeypatch.undo()
    run.pretrain(settings[0], tmp_path / "run", settings[1], config)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_goes_on_reads_its_references(whole, tmp_path, monkeypatch, phase):
    start(phase, whole, tmp_path / "run")
    monkeypatch.setattr(loop, "_end_epoch", lambda *args: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        PHASES[phase](whole[0], tmp_path / "run")
    monkeypatch.undo()
    computed, cheap = [], baselines.cheap
    monkeypatch.setattr(baselines, "cheap", lambda dataset, name: (computed.append(name), cheap(dataset, name))[1])
    PHASES[phase](whole[0], tmp_path / "run")
    assert computed == {"pretrain": [], "learn": TASKS[1:]}[phase]


@pytest.mark.parametrize("broken", [None, "not JSON", "[]"])
def test_references_of_another_dataset_are_computed_anew(whole, tmp_path, broken):
    """So are those of another table of the same users, and those in a file that was damaged."""
    synthetic.prepare(tmp_path / "shop", num_users=100, num_items=50, seed=1)
    one, shop = Dataset(whole[0]), Dataset(tmp_path / "shop")
    checkpoint = tmp_path / "segment.safetensors"
    want = run._references(one, "segment", checkpoint)
    (kept,) = tmp_path.glob("segment.*")
    assert run._references(one, "segment", checkpoint) == want
    if broken:
        kept.write_text(broken)
    got = run._references(shop, "segment", checkpoint)
    assert got != want
    assert got == run._references(shop, "segment", tmp_path / "other.safetensors")
    shutil.copyfile(shop.path / "tasks" / "click.parquet", shop.path / "tasks" / "segment.parquet")
    header = shop.path / "dataset.json"
    header.write_text(header.read_text().replace('"sha256"', '"was"'))
    assert run._references(Dataset(shop.path), "segment", checkpoint) != got


@pytest.mark.parametrize("now", [False, True])
def test_a_save_that_takes_long_is_seldom(tmp_path, monkeypatch, now):
    """Every second by its settings, but one that takes 3 s has cost enough for a minute; so have those of epochs."""
    clock, saved = [100.0], []

    def save(*args):
        saved.append(clock[0])
        clock[0] += 3

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(store, "save_tensors", save)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    keeper = checkpoint.Checkpoint(tmp_path / "a.safetensors", 1.0, {"weight": weight}, optimizer, {})
    for _ in range(130):
        clock[0] += 1
        keeper.save(checkpoint.Progress(), {}, {}, now=now)
    assert saved == [101, 164, 227]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_random_moments_resumes_with_the_same_bits(whole, tmp_path, phase):
    """SIGKILL, 50 times over, before the run may end."""
    want, out = start(phase, whole, tmp_path / "run"), tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])
    dice, longest, kills = random.Random(0), 0.3, 0
    while kills < KILLS:
        process = context.Process(target=PHASES[phase], args=(whole[0], out))
        process.start()
        process.join(dice.uniform(0.05, longest))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it came to its end: the same bits, and from the start again
            assert process.exitcode == 0
            assert contents(out) == contents(want)
            shutil.rmtree(out)
            start(phase, whole, out)
    process = context.Process(target=PHASES[phase], args=(whole[0], out))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert contents(out) == contents(want)


def test_learning_on_leaves_earlier_tasks_bit_for_bit(whole):
    """The record holds the hash of each task's outputs on all test users when it was closed."""
    dataset, _, out = whole
    found = run.verify_unchanged(out, Dataset(dataset))
    assert found["tasks"] == {name: "equal" for name in ["next", *TASKS]}
    assert found["not_checked"] is None


def test_verify_finds_a_task_that_changed(whole, tmp_path):
    shutil.copytree(whole[2], tmp_path / "run")
    model, record = store.from_pretrained(tmp_path / "run"), store.read_manifest(tmp_path / "run")["record"]
    model.task("range").head.bias[0] += 1e-3
    store.save_pretrained(model, tmp_path / "run", record)
    found = run.verify_unchanged(tmp_path / "run", Dataset(whole[0]))
    assert found["tasks"] == {"next": "equal", "range": "changed", "segment": "equal"}


def test_a_checkpoint_of_other_settings_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_end_epoch", lambda *args: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        pretrain(whole[0], tmp_path / "run")
    monkeypatch.undo()
    settings = type(PRETRAIN)(epochs=2, batch_tokens=600, checkpoint_seconds=0)
    with pytest.raises(ValueError, match=r"next\.safetensors is the checkpoint of a run with config.epochs = 3"):
        run.pretrain(Dataset(whole[0]), tmp_path / "run", {"dim": 16, "num_heads": 1, "max_len": 20}, settings)


def test_a_checkpoint_made_from_another_task_of_the_same_name_is_refused(whole, tmp_path, monkeypatch):
    """segment's contextual prompt reads range's, which was learned anew with another seed meanwhile."""
    dataset, path = Dataset(whole[0]), tmp_path / "segment.safetensors"
    models = [store.from_pretrained(whole[1]) for _ in range(2)]
    for seed, model in enumerate(models):
        train.learn_task(model, dataset, "range", dataclasses.replace(LEARN, seed=seed), MEMORY)
    monkeypatch.setattr(loop, "_end_epoch", lambda *args: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        train.learn_task(models[0], dataset, "segment", LEARN, MEMORY, path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"segment\.safetensors is the checkpoint of a run with made_of\.range"):
        train.learn_task(models[1], dataset, "segment", LEARN, MEMORY, path)
    train.learn_task(models[0], dataset, "segment", LEARN, MEMORY, path)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_another_process_is_at_is_refused(whole, tmp_path, phase):
    shutil.copytree(whole[1], tmp_path / "run")
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", held, done))
    process.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match=f"run is in use by process {process.pid} on .+; wait for it"):
        PHASES[phase](whole[0], tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole[1])
    done.set()
    process.join()
    PHASES[phase](whole[0], tmp_path / "run")
    assert contents(tmp_path / "run") == contents(start(phase, whole, tmp_path / "other"))


def hold(out, held, done):
    with store.lock(out):
        held.set()
        done.wait(60)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_is_held_while_it_trains(whole, tmp_path, monkeypatch, phase):
    start(phase, whole, tmp_path / "run")
    seen = []

    def at_the_end_of_an_epoch(*args):
        with pytest.raises(ValueError, match=r"run is in use by process") as caught, store.lock(tmp_path / "run"):
            pass
        seen.append(caught)
        raise Interrupted

    monkeypatch.setattr(loop, "_end_epoch", at_the_end_of_an_epoch)
    with pytest.raises(Interrupted):
        PHASES[phase](whole[0], tmp_path / "run")
    assert len(seen) == 1
    with store.lock(tmp_path / "run"):  # free again, whatever ended it
        pass


def test_learning_in_a_folder_that_is_no_run_leaves_nothing_there(whole, tmp_path):
    with pytest.raises(ValueError, match="manifest.json is missing; name the folder of a run"):
        learn(whole[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_complete_run_is_left_as_it_is(whole, tmp_path):
    shutil.copytree(whole[2], tmp_path / "run")
    before = contents(tmp_path / "run")
    pretrain(whole[0], tmp_path / "run")
    learn(whole[0], tmp_path / "run")
    assert contents(tmp_path / "run") == before
    with pytest.raises(ValueError, match="backbone.dim = 16, this call has 32"):
        run.pretrain(Dataset(whole[0]), tmp_path / "run", {"dim": 32, "num_heads": 1, "max_len": 20}, PRETRAIN)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss(whole, tmp_path, precision):
    torch.set_num_threads(1)
    config = type(PRETRAIN)(epochs=4, batch_tokens=600, precision=precision)
    run.pretrain(Dataset(whole[0]), tmp_path / "run", {"dim": 16, "num_heads": 1, "max_len": 20}, config)
    run.learn(tmp_path / "run", Dataset(whole[0]), "segment", type(LEARN)(epochs=4, precision=precision), MEMORY)
    for curve in store.read_manifest(tmp_path / "run")["record"]["curves"].values():
        assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_checkpoint_left_by_a_kill_after_the_last_save_is_removed(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / "next.safetensors"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"left")
    pretrain(whole[0], tmp_path / "run")
    assert not left.exists()


def test_what_is_known_is_not_measured_again_on_another_machine(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[2], tmp_path / "run")
    here = run.machine()
    monkeypatch.setattr(run, "machine", lambda: here | {"threads": 99})
    monkeypatch.setattr(run.infer, "evaluate", None)
    learn(whole[0], tmp_path / "run")


def test_a_lock_that_is_a_link_empties_nothing(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(store.StoreError, match="must be a file, which is locked, not a link or a folder; remove it"):
        pretrain(whole[0], tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"x"])
def test_a_damaged_checkpoint_says_how_to_go_on(whole, tmp_path, monkeypatch, spoil):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_end_epoch", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            pretrain(whole[0], tmp_path / "run")
    (kept,) = (tmp_path / "run" / "checkpoints").glob("*.safetensors")
    kept.write_bytes(spoil(kept.read_bytes()))
    with pytest.raises(store.StoreError, match=rf"safetensors .*; remove {kept} to start this training again$"):
        pretrain(whole[0], tmp_path / "run")
    kept.unlink()
    pretrain(whole[0], tmp_path / "run")
    assert contents(tmp_path / "run") == contents(whole[1])


def test_a_run_in_the_folder_of_a_dataset_is_refused(whole, tmp_path):
    data = shutil.copytree(whole[0], tmp_path / "data")
    before = sorted(data.iterdir())
    with pytest.raises(ValueError, match=f"{data} is the folder of a dataset; choose another one for the run"):
        pretrain(data, data)
    assert sorted(data.iterdir()) == before
