"""A TaskSpec takes values of its types alone: what JSON or TOML got wrong is not converted."""

import numpy as np
import pytest
import torch

from pcl_ext import TaskSpec


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": ["items"]}, "kind of task 'a' must be of type str, got ['items']"),
        ({"description": 5}, "description of task 'a' must be of type str, got 5"),
        ({"metric": 5}, "metric of task 'a' must be of type str, got 5"),
        ({"repeats": "false"}, "repeats of task 'a' must be of type bool, got 'false'"),
        ({"repeats": 1}, "repeats of task 'a' must be of type bool, got 1"),
        ({"catalogue": "45"}, "catalogue of task 'a' must be a list of item ids, got '45'"),
        ({"catalogue": {"4": 5}}, "catalogue of task 'a' must be a list of item ids, got {'4': 5}"),
        ({"catalogue": 45}, "catalogue of task 'a' must be a list of item ids, got 45"),
        ({"catalogue": [4.7, 5]}, "catalogue of task 'a' must hold integers, got 4.7"),
        ({"catalogue": ["4"]}, "catalogue of task 'a' must hold integers, got '4'"),
        ({"catalogue": [True]}, "catalogue of task 'a' must hold integers, got True"),
        ({"kind": "classes", "num_classes": 2.5}, "num_classes of task 'a' must be of type int, got 2.5"),
        ({"kind": "classes", "num_classes": True}, "num_classes of task 'a' must be of type int, got True"),
        ({"kind": "classes", "num_classes": "3"}, "num_classes of task 'a' must be of type int, got '3'"),
    ],
    ids=str,
)
def test_wrong_types_are_refused(values, words):
    with pytest.raises(TypeError) as error:
        TaskSpec.from_json({"name": "a", "kind": "items"} | values)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter])
def test_a_catalogue_may_be_any_integers(kind):
    catalogue = TaskSpec("a", "items", catalogue=kind([5, 4])).catalogue
    assert catalogue == (5, 4)
    assert all(type(item) is int for item in catalogue)


def test_classes_have_names():
    named = TaskSpec("a", "classes", num_classes=2, labels=["no", 1])
    assert named.labels == ("no", "1")
    assert TaskSpec.from_json(named.to_json()) == named
    assert "labels" not in TaskSpec("a", "binary").to_json()
    for kind, labels, words in (
        ("binary", ["a"], r"labels of task 'a' must be a list of 2 names, got \['a'\]"),
        ("binary", "ab", "labels of task 'a' must be a list of 2 names, got 'ab'"),
        ("regression", ["a"], "labels are for classes and binary only, task 'a' is regression"),
    ):
        with pytest.raises(ValueError, match=words):
            TaskSpec("a", kind, labels=labels)
