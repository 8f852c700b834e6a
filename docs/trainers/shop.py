"""What every recipe trains: the next item, over the dataset folder `shop`, step by step for any number of processes."""

import torch
from torch import Tensor, nn

from pcl_ext import Backbone, BackboneConfig, PackedBatch
from pcl_ext.data import Dataset, make_batch, plan
from pcl_ext.next_item import shift

MAX_LEN = 20


class NextItem(nn.Module):
    """A backbone whose forward is the loss, so that whatever wraps a module wraps all of it."""

    def __init__(self, num_items: int):
        super().__init__()
        torch.manual_seed(0)  # every process starts with the same weights
        self.backbone = Backbone(BackboneConfig(num_items, dim=32, max_len=MAX_LEN, dropout=0.0))

    def forward(self, history: PackedBatch, events: float) -> Tensor:
        """Summed over this process, divided by the events a process has on average: their mean is that of the step."""
        history, target = shift(history)
        scores = self.backbone(history)[-1] @ self.backbone.table[1:].T
        return (scores.logsumexp(1) - scores.gather(1, target[:, None].long() - 1)[:, 0]).sum() / events


class Steps(torch.utils.data.Dataset):
    """Every step of a run in order, all epochs after one another: its histories of this process, and `events`."""

    def __init__(self, dataset: Dataset, rank: int = 0, world: int = 1, epochs: int = 2):
        self.dataset, self.rank, self.world = dataset, rank, world
        self.examples = dataset.sequences("train", MAX_LEN)
        sizes = {"max_tokens": 512, "max_len": MAX_LEN + 1}
        self.rows = [rows for seed in range(epochs) for rows in plan(self.examples, seed=seed, **sizes)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> tuple[PackedBatch, float]:
        rows = self.rows[step]
        events = (self.examples.cut[rows].clamp_max(MAX_LEN + 1) - 1).sum().item() / self.world
        return make_batch(self.dataset, self.examples, rows[self.rank :: self.world], MAX_LEN + 1).history, events
