"""A dataset of which only some labels are known to those who learn."""

from __future__ import annotations

import torch

from pcl_ext.data import Dataset, Examples


class FewLabels(Dataset):
    """Labels of a share of a task's train users, or of so many of them; drawn by seed. T1 has none to lose."""

    def __init__(self, path: str, seed: int, share: float = 1.0, count: int | None = None):
        super().__init__(path)
        self.seed, self.share, self.count = seed, share, count

    def examples(self, name: str, fold: str | None) -> Examples:
        examples = super().examples(name, fold)
        if fold != "train" or name == "next":
            return examples
        known = round(self.share * len(examples)) if self.count is None else min(self.count, len(examples))
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.seed))
        return examples.select(order[: max(1, known)].sort().values)


def open_dataset(path: str, share: float, seed: int) -> Dataset:
    return Dataset(path) if share == 1 else FewLabels(path, seed, share)
