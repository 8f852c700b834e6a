"""DistributedDataParallel with checkpoints: torchrun --standalone --nproc-per-node 2 data_parallel.py

Killed at any time, the same command goes on after the last step that was saved.
"""

import os

import torch
import torch.distributed as dist
from shop import NextItem, Steps
from torch.nn.parallel import DistributedDataParallel

from pcl_ext.data import Dataset

CHECKPOINT = "checkpoint.pt"


def train() -> None:
    dataset = Dataset("shop")
    model = NextItem(dataset.num_items)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    done = 0
    if os.path.exists(CHECKPOINT):
        state = torch.load(CHECKPOINT)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    steps = Steps(dataset, dist.get_rank(), dist.get_world_size())
    for step in range(done, len(steps)):
        loss = parallel(*steps[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
            torch.save(state, CHECKPOINT + ".new")
            os.replace(CHECKPOINT + ".new", CHECKPOINT)  # there is always a whole one


def main() -> None:
    dist.init_process_group("gloo")
    train()  # a function of its own: what still holds the model would hold the group, beyond its end
    dist.barrier()  # a gloo thread that still holds a tensor of Python when the interpreter ends would abort it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
