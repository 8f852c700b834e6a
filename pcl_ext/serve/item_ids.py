"""Items by the ids that they have in the log they came from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcl_ext.data import Dataset
    from pcl_ext.store.record import Record

_LOG = logging.getLogger(__name__)


class ItemIds:
    """A dataset's items.parquet: from the log's own ids to those of the dataset, 1..V, and back.

    The log's ids are text there; where all of them are whole numbers, `original` gives numbers. FileNotFoundError or
    ValueError names a file that is missing or is no such table.

    are_int64  whether they are numbers that an int64 holds
    """

    def __init__(self, path: str | Path):
        from pcl_ext.data.item_table import read_items  # with the extra `cli`, which the package is imported without

        self.path = path = Path(path)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "missing"
            raise FileNotFoundError(f"{path} must be the items.parquet of a dataset, it is {what}")
        if (table := read_items(path)) is None:
            raise ValueError(f"{path} must be a table of item_id and original_id, it has no original_id")
        ids, originals = (column.tolist() for column in table)
        if min(len(set(ids)), len(set(originals))) < len(ids):
            raise ValueError(f"{path}: item_id and original_id must name every item once, got one twice")
        self._ids = dict(zip(originals, ids))
        numbers = all(map(_is_number, originals))
        self.are_int64 = numbers and all(-(2**63) <= int(text) < 2**63 for text in originals)
        self._originals = dict(zip(ids, map(int, originals) if numbers else originals))

    def check(self, num_items: int) -> None:
        """ValueError unless the items 1..num_items of a run are among these; there may be newer ones."""
        if not self._originals.keys() >= set(range(1, num_items + 1)):
            named = len(self._originals)
            raise ValueError(f"{self.path} must name the items 1..{num_items} of the run's dataset, it names {named}")

    def item_ids_sha256(self, count: int) -> str | None:
        """As that of a `Dataset`."""
        from pcl_ext.data.item_table import item_ids_sha256

        return item_ids_sha256(self.path, count)

    def known(self, history: Sequence[int | str]) -> list[int]:
        """The dataset's ids of a history in the log's; 0, which a Predictor drops and counts, for unknown ones.
        TypeError for one id in place of a list."""
        if isinstance(history, (str, bytes)):
            raise TypeError(f"history must be a list of the log's item ids, got {history!r:.80}")
        return [self._ids.get(str(item), 0) for item in history]

    def original(self, items: Iterable[int]) -> list[int | str | None]:
        """The log's ids of items 1..V; None for 0, a rank without an item."""
        items = [int(item) for item in items]
        if unknown := [item for item in items if item and item not in self._originals]:
            raise ValueError(f"items must be 0 or among those that {self.path} names, got {unknown[0]}")
        return [self._originals[item] if item else None for item in items]


def describe_items(dataset: Dataset) -> dict[str, Any]:
    """What a run's record keeps of the items that it was made from, for `check_items`."""
    return {"count": dataset.num_items, "sha256": dataset.item_ids_sha256(dataset.num_items)}


def check_items(run: Path, record: Record, given: Dataset | ItemIds) -> None:
    """ValueError where the items 1..V of a run are others in a dataset or a table of item ids. There may be newer ones.
    Not known of an older run, nor, which a logged warning says, of a dataset that does not name its items."""
    made_from = record.dataset
    then = made_from.get("item_ids") if isinstance(made_from, dict) else None
    if not isinstance(then, dict) or then.get("sha256") is None:
        return
    now = given.item_ids_sha256(then["count"])
    if now is None:
        _LOG.warning("%s has no original ids of its items: they are taken for those of %s", given.path, run)
    elif now != then["sha256"]:
        raise ValueError(
            f"{given.path}: items 1..{then['count']} are not those of {made_from['path']}, from which {run} was made; "
            "prepare it with [events] item_ids, the items.parquet that was there then, which keeps their numbers"
        )


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and str(int(text)) == text
