"""`pcl prepare ml-1m`: the MovieLens 1M folder a user has downloaded, and four tasks about its users.

The history is every movie a user rated, but for a fifth of the movies, by hash, that no input holds: which of those
the user rates 4 or more is a task of its own.
"""

from __future__ import annotations

from pathlib import Path

from pcl_ext.data.config import parse_config
from pcl_ext.data.events import build
from pcl_ext.data.tablefile import columns_of, read_table
from pcl_ext.data.writer import source as describe

AGES = [1, 18, 25, 35, 45, 50, 56]  # the lowest age of each group
OCCUPATIONS = list(range(21))
_FORMAT = {"delimiter": "::", "encoding": "latin-1"}
_CONFIG = {
    "name": "ml-1m",
    "events": {
        "file": "ratings.dat",
        "columns": ["user_id", "item_id", "rating", "time"],
        "time": "time",
        "distinct": True,
        "min_length": 3,
        **_FORMAT,
    },
    "users": {"file": "users.dat", "columns": ["user_id", "gender", "age", "occupation", "zip"], **_FORMAT},
    "task": [
        {
            "name": "liked",
            "kind": "items",
            "description": "which movies of a held-out fifth the user rates 4 or more",
            "source": "events",
            "where": [["rating", ">=", 4]],
            "items": {"modulo": 5},
        },
        {
            "name": "gender",
            "kind": "binary",
            "description": "the user's gender",
            "column": "gender",
            "labels": ["F", "M"],
        },
        {
            "name": "age",
            "kind": "classes",
            "description": "the user's age group",
            "column": "age",
            "labels": AGES,
        },
        {
            "name": "occupation",
            "kind": "classes",
            "description": "the user's occupation",
            "column": "occupation",
            "labels": OCCUPATIONS,
        },
    ],
}


def prepare(folder: str | Path, out: str | Path, *, rotate: int | None = None) -> None:
    """`folder` holds ratings.dat and users.dat as GroupLens ships them; `out` becomes a dataset.

    Raises FileNotFoundError for missing files and ValueError for lines that are not in that format.
    """
    folder = Path(folder)
    config = parse_config(_CONFIG, folder)
    events = read_table(config.events, folder, "ratings.dat", {"user_id", "item_id", "rating", "time"})
    users = read_table(config.users, folder, "users.dat", {"user_id", "gender", "age", "occupation"})
    sources = [describe(folder / file) for file in ("ratings.dat", "users.dat")]
    build(config, out, columns_of(events), users, rotate=rotate, sources=sources)
