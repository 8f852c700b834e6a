"""The settings file of the comparison's second dataset reads what GroupLens ships."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pcl_ext.data import Dataset, prepare_events
from pcl_ext.data.split import stable_hash

CONFIG = Path(__file__).parents[2] / "benchmarks/continual/ml-100k.toml"
JOBS = ["artist", "none", "writer"]


def test_histories_and_tasks(tmp_path):
    rng = np.random.default_rng(0)
    ratings = [
        f"{user}\t{movie}\t{rng.integers(1, 6)}\t{10**9 + place}"
        for user in range(1, 61)
        for place, movie in enumerate(rng.choice(np.arange(1, 31), 12, replace=False))
    ]
    people = [f"{u}|{10 + u}|{'MF'[u % 2]}|{JOBS[u % 3]}|{u:05d}" for u in range(1, 61)]
    (tmp_path / "u.data").write_text("\n".join(ratings) + "\n")
    (tmp_path / "u.user").write_text("\n".join(people) + "\n")
    shutil.copy(CONFIG, tmp_path)
    prepare_events(tmp_path / CONFIG.name, tmp_path / "out")
    dataset = Dataset(tmp_path / "out")
    assert dataset.task_names == ("next", "age", "gender", "liked", "mean_rating", "occupation")
    users = dataset.user_id.tolist()
    assert dataset.task("gender").target.tolist() == [u % 2 for u in users]
    assert dataset.task("age").target.tolist() == [sum(10 + u >= e for e in (18, 25, 35, 45, 50, 56)) for u in users]
    assert dataset.task("occupation").spec.labels == tuple(JOBS)
    given = [line.split("\t") for line in ratings]
    means = [np.mean([int(rating) for user, _, rating, _ in given if int(user) == u]) for u in users]
    np.testing.assert_allclose(dataset.task("mean_rating").target, means, rtol=1e-6)
    held = {movie for movie in range(1, 31) if stable_hash(f"ml-100k:item:{movie}") % 5 == 0}
    names = pq.read_table(tmp_path / "out/items.parquet")["original_id"].to_pylist()
    liked = dataset.task("liked")
    got = {(users[row], int(names[item - 1])) for row, item in zip(liked.user, liked.target, strict=True)}
    assert got == {(int(u), int(m)) for u, m, rating, _ in given if int(rating) >= 4 and int(m) in held} != set()
