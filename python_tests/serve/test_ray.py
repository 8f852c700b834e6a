"""The recipe for Ray Data, on a local Ray."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import make_model

from pcl_ext import Predictor, save_pretrained

RECIPE = Path(__file__).parent.parent.parent / "docs" / "encode_with_ray.py"


def test_the_recipe_is_short():
    assert len(RECIPE.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_the_recipe_gives_what_a_predictor_gives(tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[data]'")
    save_pretrained(make_model("next", "ctr", "age"), tmp_path / "run")
    histories = [list(range(1, 1 + n % 9)) for n in range(100)]
    users = pa.table({"user_id": np.arange(100) + 7, "items": pa.array(histories, pa.list_(pa.int32()))})
    pq.write_table(users, tmp_path / "histories.parquet", row_group_size=30)
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
    try:
        recipe.main(str(tmp_path / "run"), str(tmp_path / "histories.parquet"), str(tmp_path / "out"), "ctr", "age")
    finally:
        ray.shutdown()
    got = pq.read_table(tmp_path / "out").sort_by("user_id")
    assert got["user_id"].to_pylist() == users["user_id"].to_pylist()
    want = Predictor(tmp_path / "run").encode(histories, ["ctr", "age"])
    for task, vectors in want.items():
        np.testing.assert_allclose(np.array(got[task].to_pylist()), vectors, rtol=1.3e-6, atol=1e-5)
