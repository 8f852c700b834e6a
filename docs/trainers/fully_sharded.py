"""A backbone too large for one process, by fully_shard: torchrun --standalone --nproc-per-node 2 fully_sharded.py"""

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain_loop import train
from shop import NextItem, Steps
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pcl_ext.data import Dataset


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dataset = Dataset("shop")
    model = NextItem(dataset.num_items)
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh)  # whole only while it computes
    fully_shard(model, mesh=mesh)  # what is left: embeddings and the last norm
    train(model, Steps(dataset, dist.get_rank(), dist.get_world_size()))
    dcp.save({"model": model.state_dict()}, checkpoint_id="model")  # every process its part
    dist.barrier()  # a gloo thread that still holds a tensor of Python when the interpreter ends would abort it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
