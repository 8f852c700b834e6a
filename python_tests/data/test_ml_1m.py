import numpy as np
import pytest

from pcl_ext.data import Dataset, prepare_ml_1m
from pcl_ext.data.split import stable_hash


@pytest.fixture
def folder(tmp_path):
    """40 users, 30 movies, in the format of ratings.dat, users.dat and movies.dat."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(1, 41):
        movies = rng.choice(np.arange(1, 31), 12, replace=False)
        times = rng.permutation(12) + 10**9
        lines += [f"{user}::{m}::{rng.integers(1, 6)}::{t}" for m, t in zip(movies, times, strict=True)]
    ages = [1, 18, 25, 35, 45, 50, 56]
    users = [f"{u}::{'MF'[u % 2]}::{ages[u % 7]}::{u % 21}::{u:05d}-12" for u in range(1, 41)]
    movies = [f'{m}::Café, "{m}" (1990)::Comedy|Drama' for m in range(1, 31)]
    for name, text in (("ratings", lines), ("users", users), ("movies", movies)):
        (tmp_path / f"{name}.dat").write_bytes(("\n".join(text) + "\n").encode("latin-1"))
    return tmp_path


def test_histories_and_tasks(folder):
    prepare_ml_1m(folder, folder / "out")
    dataset = Dataset(folder / "out")
    ratings = [tuple(map(int, line.split("::"))) for line in (folder / "ratings.dat").read_text().splitlines()]
    held = {m for m in range(1, 31) if stable_hash(f"ml-1m:item:{m}") % 5 == 0}
    assert held
    movie = dict(zip(range(1, dataset.num_items + 1), original_ids(dataset), strict=True))
    for row, user in enumerate(dataset.user_id.tolist()):
        want = [m for _, m in sorted((t, m) for u, m, _, t in ratings if u == user) if m not in held]
        got = dataset.items[dataset.offsets[row] : dataset.offsets[row + 1]]
        assert [movie[i] for i in got.tolist()] == want
    liked = dataset.task("liked")
    got = {(int(dataset.user_id[u]), movie[i]) for u, i in zip(liked.user, liked.target.tolist(), strict=True)}
    assert got == {(u, m) for u, m, rating, _ in ratings if rating >= 4 and m in held}
    assert dataset.task_names == ("next", "age", "gender", "liked", "occupation")
    assert dataset.task("gender").target.tolist() == [1 - u % 2 for u in range(1, 41)]
    assert dataset.task("age").target.tolist() == [u % 7 for u in range(1, 41)]
    assert dataset.task("age").spec.labels == ("1", "18", "25", "35", "45", "50", "56")
    assert (dataset.task("occupation").spec.num_classes, dataset.task("age").spec.num_classes) == (21, 7)


def original_ids(dataset):
    import pyarrow.parquet as pq

    return [int(value) for value in pq.read_table(dataset.path / "items.parquet")["original_id"].to_pylist()]


@pytest.mark.parametrize("name", ["ratings", "users"])
def test_missing_and_broken_files_are_named(folder, name):
    (folder / f"{name}.dat").write_text("1::2\n1\n")
    with pytest.raises(ValueError, match=f"{name}.dat is not readable as CSV"):
        prepare_ml_1m(folder, folder / "out")
    (folder / f"{name}.dat").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.dat is missing"):
        prepare_ml_1m(folder, folder / "out")
    assert not (folder / "out").exists()
