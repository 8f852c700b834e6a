"""Hugging Face Trainer: python hugging_face.py"""

import torch
from shop import NextItem, Steps
from torch import nn
from transformers import Trainer, TrainingArguments

from pcl_ext.data import Dataset


class WithLoss(nn.Module):
    """The Trainer wants named inputs and an output that holds the loss."""

    def __init__(self, num_items: int):
        super().__init__()
        self.model = NextItem(num_items)

    def forward(self, history, events):
        return {"loss": self.model(history, events)}


def collate(steps):
    return dict(zip(("history", "events"), steps[0]))  # one step a batch: it is planned already


def main() -> None:
    dataset = Dataset("shop")
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    same = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False}
    arguments = TrainingArguments("out", **settings, **same, **quiet)
    model = WithLoss(dataset.num_items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    Trainer(model, arguments, collate, Steps(dataset), optimizers=(optimizer, None)).train()
    torch.save(model.model.state_dict(), "model.pt")


if __name__ == "__main__":
    main()
