"""Lightning: python lightning_trainer.py"""

import lightning
import torch
from shop import NextItem, Steps
from torch.utils.data import DataLoader

from pcl_ext.data import Dataset


class Module(lightning.LightningModule):
    def __init__(self, num_items: int):
        super().__init__()
        self.model = NextItem(num_items)

    def training_step(self, batch, number):
        loss = self.model(*batch)
        self.log("loss", loss, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    dataset = Dataset("shop")
    module = Module(dataset.num_items)
    loader = DataLoader(Steps(dataset), batch_size=None)  # the batches are planned, in order
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    torch.save(module.model.state_dict(), "model.pt")


if __name__ == "__main__":
    main()
