"""Measuring a task: on which users early stopping looks, and what a fingerprint is of."""

import copy
import hashlib
from unittest import mock

import numpy as np
import pytest
import torch

from pcl_ext import infer
from pcl_ext.train import Judge, LearnConfig, PretrainConfig


def test_early_stopping_looks_at_the_same_few_valid_users_each_epoch(dataset, pretrained):
    model, whole = copy.deepcopy(pretrained), dataset.examples("click", "valid")
    model.add_task(dataset.task("click").spec)
    with mock.patch.object(infer, "measure") as measure:
        judges = [Judge(model, dataset, "click", LearnConfig(valid_examples=5, seed=seed)) for seed in (0, 0, 1)]
        for judge in (judges[0], *judges):
            judge()
    first, *others = (call.args[3].user.tolist() for call in measure.call_args_list)
    assert [user == first for user in others] == [True, True, False]
    assert len(first) == 5
    assert first == sorted(set(first) & set(whole.user.tolist()))


@pytest.mark.parametrize("count", [0, 1000])
def test_few_valid_users_are_all_looked_at(dataset, pretrained, count):
    state = torch.get_rng_state()
    judge = Judge(pretrained, dataset, "next", LearnConfig(valid_examples=count))
    whole = dataset.examples("next", "valid")
    assert torch.equal(judge.examples.user, whole.user)
    got, want = judge(), infer.evaluate(pretrained, dataset, ["next"], fold="valid")["next"]
    assert (got.metrics, got.loss, got.outputs) == (want.metrics, want.loss, "")
    assert torch.equal(torch.get_rng_state(), state)


def test_over_a_large_catalogue_early_stopping_looks_at_fewer(dataset, pretrained):
    with mock.patch.multiple(infer, FEWEST=4, MOST_JUDGED=7 * dataset.num_items):
        assert len(Judge(pretrained, dataset, "next", LearnConfig()).examples) == 7
        assert len(Judge(pretrained, dataset, "next", LearnConfig(valid_examples=5)).examples) == 5
        assert len(Judge(pretrained, dataset, "next", LearnConfig(valid_examples=0)).examples) > 7
    with mock.patch.multiple(infer, FEWEST=4, MOST_JUDGED=2 * dataset.num_items):
        assert len(Judge(pretrained, dataset, "next", LearnConfig()).examples) == 4


def test_a_fold_with_too_many_scores_is_measured_on_a_sample_that_says_so(dataset, pretrained):
    """The same sample at every call, so that its bits can be compared; labels have one score each."""
    model, whole = copy.deepcopy(pretrained), len(dataset.examples("next", "test"))
    model.add_task(dataset.task("click").spec)
    with mock.patch.multiple(infer, FEWEST=4, MOST_MEASURED=11 * dataset.num_items):
        first, again = (infer.evaluate(model, dataset) for _ in range(2))
    assert first == again
    assert first["next"].sample == f"11 of {whole} examples"
    assert first["next"].count == 11
    assert first["click"].sample == ""
    assert infer.evaluate(model, dataset, ["next"])["next"].sample == ""


def test_a_sample_of_one_class_is_not_used_for_auc(dataset, pretrained):
    """One example has one class."""
    model = copy.deepcopy(pretrained)
    model.add_task(dataset.task("click").spec)
    judge = Judge(model, dataset, "click", LearnConfig(valid_examples=1))
    assert len(judge.examples) == len(dataset.examples("click", "valid"))
    assert "auc" in judge().metrics


@pytest.mark.parametrize("config", [PretrainConfig, LearnConfig])
@pytest.mark.parametrize("count", [-1, 2.0, True])
def test_the_number_of_valid_examples_is_checked(config, count):
    with pytest.raises(ValueError, match="valid_examples must be a whole number from 1 up, or 0 for all, got"):
        config(valid_examples=count)


def test_the_fingerprint_is_of_the_outputs_without_a_copy(dataset, pretrained):
    taken = []
    with mock.patch.object(infer.hashlib, "sha256") as digest:
        digest.return_value.update.side_effect = taken.append
        infer.evaluate(pretrained, dataset, ["next"])
    examples = dataset.examples("next", "test")
    outputs = [output for _, output in infer.outputs(pretrained, dataset, "next", examples)]
    assert all(isinstance(part, np.ndarray) for part in taken)
    want = hashlib.sha256(b"".join(output.numpy().tobytes() for output in outputs)).hexdigest()
    assert infer.evaluate(pretrained, dataset, ["next"])["next"].outputs == want
