from hashlib import sha256

import numpy as np
import pytest

from pcl_ext.data import FOLDS, fold_of
from pcl_ext.data.split import hash_modulo


def bucket(text):
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") % 100


@pytest.mark.parametrize("rotate", [None, 0, 1, 2, 3, 4])
def test_folds_follow_the_rule(rotate):
    ids = list(range(500))
    got = [FOLDS[fold] for fold in fold_of("online-retail", np.array(ids), rotate)]
    for user, fold in zip(ids, got, strict=True):
        b = bucket(f"online-retail:user:{user}")
        if rotate is None:
            want = "train" if b < 80 else "valid" if b < 85 else "test"
        else:
            b = (b + 20 * rotate) % 100
            want = "train" if b < 75 else "valid" if b < 80 else "test"
        assert fold == want


def test_every_user_is_tested_once_over_the_rotations():
    tested = np.stack([fold_of("d", range(1000), f) == 2 for f in range(5)])
    assert (tested.sum(axis=0) == 1).all()


def test_integers_and_text_of_the_same_digits_agree():
    assert (
        hash_modulo("d", "item", np.array([1, 2], np.int32), 7).tolist()
        == hash_modulo("d", "item", ["1", "2"], 7).tolist()
    )


@pytest.mark.parametrize("rotate", [-1, 5, 1.0, True, "0"])
def test_other_rotations_are_refused(rotate):
    with pytest.raises(ValueError, match="rotate must be None or one of 0..4"):
        fold_of("d", [1], rotate)
