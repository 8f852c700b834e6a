"""The page's pictures show what is worth looking at."""

import numpy as np
import pytest

from benchmarks.continual import page
from benchmarks.continual.intervals import Interval
from benchmarks.continual.summary import Row, Summary


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of images."""
    figures = []
    monkeypatch.setattr(page, "png", figures.append)
    monkeypatch.setattr(page, "image", lambda *_: "")
    return figures


def test_curves_are_of_those_who_forget_and_of_pcl(drawn):
    tasks = ["next", "segment", "range"]
    lost = {"fine": 0.1, "conure": 0.0, "pcl-eq1": 0.0, "pcl": 0.0}
    rows = {n: Row(n, 1, dict.fromkeys(tasks, 0.5), {}, dict.fromkeys(tasks, v), 0, 0.0) for n, v in lost.items()}
    values = np.where(np.tri(3), 0.5, np.nan)
    values[2, 0] = 0.4
    metric = dict.fromkeys(tasks, "accuracy")
    page._curves(Summary(rows, {}, {name: (tasks, values) for name in rows}, metric, {}, {}))
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["fine", "pcl"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0, 0.9])


def test_a_gain_beyond_all_others_does_not_flatten_them(drawn):
    found = {"best": ("mtl", {"mean": Interval(0.01, -0.01, 0.02)}), "control": ("none", {"mean": Interval(3, 2, 4)})}
    page._forest(found)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["best: mtl"]
    assert page._forest({"control": found["control"]}) == ""
    assert len(drawn) == 1
