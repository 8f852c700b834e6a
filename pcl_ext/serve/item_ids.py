"""Items by the ids that they have in the log they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


class ItemIds:
    """A dataset's items.parquet: from the log's own ids to those of the dataset, 1..V, and back.

    The log's ids are text there; where all of them are whole numbers, `original` gives numbers. FileNotFoundError or
    ValueError names a file that is missing or is no such table.

    are_int64  whether they are numbers that an int64 holds
    """

    def __init__(self, path: str | Path):
        from pcl_ext.data._arrow import pa, pc, pq  # of the extra `cli`, which the package is imported without

        self.path = path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; it must be the items.parquet of a dataset")
        try:
            table = pq.read_table(path, columns=["item_id", "original_id"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} must be a table of item_id and original_id: {error}") from error
        for name in ("item_id", "original_id"):
            if table[name].null_count or len(pc.unique(table[name])) < len(table):
                raise ValueError(f"{path}: {name} must name every item once, got a null or one twice")
        ids, originals = table["item_id"].to_pylist(), [str(text) for text in table["original_id"].to_pylist()]
        self._ids = dict(zip(originals, ids))
        numbers = all(map(_is_number, originals))
        self.are_int64 = numbers and all(-(2**63) <= int(text) < 2**63 for text in originals)
        self._originals = dict(zip(ids, map(int, originals) if numbers else originals))

    def check(self, num_items: int) -> None:
        """ValueError unless these are items 1..num_items: the table of another dataset would name others."""
        if self._originals.keys() != set(range(1, num_items + 1)):
            named = len(self._originals)
            raise ValueError(f"{self.path} must name the items 1..{num_items} of the run's dataset, it names {named}")

    def known(self, history: Sequence[int | str]) -> list[int]:
        """The dataset's ids of a history in the log's; 0, which a Predictor drops and counts, for unknown ones."""
        return [self._ids.get(str(item), 0) for item in history]

    def original(self, items: Iterable[int]) -> list[int | str | None]:
        """The log's ids of items 1..V; None for 0, a rank without an item."""
        items = [int(item) for item in items]
        if unknown := [item for item in items if item and item not in self._originals]:
            raise ValueError(f"items must be 0 or among those that {self.path} names, got {unknown[0]}")
        return [self._originals[item] if item else None for item in items]


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and str(int(text)) == text
