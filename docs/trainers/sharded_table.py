"""An item table too large for one process, in rows: torchrun --standalone --nproc-per-node 2 sharded_table.py"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain_loop import train
from shop import NextItem, Steps
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from pcl_ext.data import Dataset
from pcl_ext.next_item import shift


class ShardedNextItem(NextItem):
    """The same loss. A process holds the rows from `first` on of the item table, and sees all of every step."""

    def shard(self, mesh):
        rows = distribute_tensor(self.backbone.table.detach(), mesh, [Shard(0)])
        self.mesh, self.first = mesh, mesh.get_local_rank() * -(-len(rows) // mesh.size())
        self.backbone.table = torch.nn.Parameter(rows)

    def forward(self, history, events):
        history, target = shift(history)
        table, start = self.backbone.table.to_local(), max(self.first, 1)  # row 0 is no item
        ids, items = history.items.long().unique(return_inverse=True)
        read = {"table": self.owned(table.__getitem__, ids - self.first, len(table))}
        states = torch.func.functional_call(self.backbone, read, (replace(history, items=items),))[-1]
        states = DTensor.from_local(states, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        scores = states @ table[start - self.first :].T
        own = self.owned(lambda at: scores.gather(1, at[:, None]), target.long() - start, scores.shape[1])
        every = DTensor.from_local(scores.logsumexp(1)[None], self.mesh, [Shard(0)]).full_tensor()
        return (every.logsumexp(0) - own[:, 0]).sum() / events

    def owned(self, read, at, size):
        """read(at) [n, c] by the process that holds these places, 0 .. size; the others add zero."""
        part = torch.where(((at >= 0) & (at < size))[:, None], read(at.clamp(0, size - 1)), 0.0)
        return DTensor.from_local(part, self.mesh, [Partial()]).full_tensor()


def main() -> None:
    dist.init_process_group("gloo")
    dataset = Dataset("shop")
    model = ShardedNextItem(dataset.num_items)
    model.shard(init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model, Steps(dataset))
    dcp.save({"model": model.state_dict()}, checkpoint_id="model")
    dist.barrier()  # a gloo thread that still holds a tensor of Python when the interpreter ends would abort it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
