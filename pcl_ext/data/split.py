"""Folds: users are split once, for all tasks, by the hash of their id."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import numpy as np

FOLDS = ("train", "valid", "test")


def stable_hash(text: str) -> int:
    """The first 8 bytes of the sha256 of `text`, big endian: the same everywhere and for ever."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def hash_modulo(dataset: str, what: str, ids: Iterable, modulo: int) -> np.ndarray:
    """stable_hash("<dataset>:<what>:<id>") % modulo for every id -> [N] int64; `what` is "user" or "item"."""
    values = ids.tolist() if isinstance(ids, np.ndarray) else ids
    return np.fromiter((stable_hash(f"{dataset}:{what}:{value}") % modulo for value in values), np.int64)


def fold_of(dataset: str, user_ids: Iterable, rotate: int | None = None) -> np.ndarray:
    """[N] uint8: 0 train, 1 valid, 2 test.

    rotate None  train 80 %, valid 5 %, test 15 % of the users
    rotate 0..4  train 75 %, valid 5 %, test 20 %; over the five every user is tested once
    """
    if rotate is not None and (isinstance(rotate, bool) or not isinstance(rotate, int) or not 0 <= rotate <= 4):
        raise ValueError(f"rotate must be None or one of 0..4, got {rotate!r}")
    bucket = hash_modulo(dataset, "user", user_ids, 100)
    if rotate is None:
        valid, test = 80, 85
    else:
        bucket, valid, test = (bucket + 20 * rotate) % 100, 75, 80
    return ((bucket >= valid).astype(np.uint8) + (bucket >= test)).astype(np.uint8)
