"""Accelerate: accelerate launch --cpu --num_processes 1 accelerate_loop.py"""

import torch
from accelerate import Accelerator
from shop import NextItem, Steps
from torch.utils.data import DataLoader

from pcl_ext.data import Dataset


def main() -> None:
    accelerator = Accelerator(cpu=True)
    dataset = Dataset("shop")
    model = NextItem(dataset.num_items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    # not prepared: a process takes its part of every step, not every other step
    steps = Steps(dataset, accelerator.process_index, accelerator.num_processes)
    for history, events in DataLoader(steps, batch_size=None):
        loss = model(history.to(accelerator.device), events)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.save(accelerator.unwrap_model(model).state_dict(), "model.pt")


if __name__ == "__main__":
    main()
