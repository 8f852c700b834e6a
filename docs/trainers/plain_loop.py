"""A plain loop: python plain_loop.py"""

import torch
from shop import NextItem, Steps

from pcl_ext.data import Dataset


def train(model: NextItem, steps: Steps) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for history, events in steps:
        loss = model(history, events)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    dataset = Dataset("shop")
    model = NextItem(dataset.num_items)
    train(model, Steps(dataset))
    torch.save(model.state_dict(), "model.pt")


if __name__ == "__main__":
    main()
