"""A run small enough for tests: 200 synthetic users, two tasks, every step a checkpoint."""

import torch

from pcl_ext import run, store, train
from pcl_ext.data import Dataset, synthetic
from pcl_ext.model import BackboneConfig, MemoryConfig
from pcl_ext.train import LearnConfig, PretrainConfig

BACKBONE = {"dim": 16, "num_heads": 1, "num_layers": 2, "max_len": 20}
PRETRAIN = PretrainConfig(epochs=3, batch_tokens=600, checkpoint_seconds=0)
LEARN = LearnConfig(epochs=3, batch_tokens=600, checkpoint_seconds=0)
MEMORY = MemoryConfig(prompt_len=4, contextual="prompts")
TASKS = ["range", "segment"]


def write_dataset(path):
    synthetic.prepare(path, num_users=200, num_items=50, mean_length=12)
    return path


def pretrain(dataset, out):
    torch.set_num_threads(1)
    return run.pretrain(Dataset(dataset), out, BACKBONE, PRETRAIN)


def pretrain_in_memory(dataset):
    """A model of one epoch."""
    torch.set_num_threads(1)
    return train.pretrain(dataset, BackboneConfig(dataset.num_items, **BACKBONE), PretrainConfig(epochs=1))[0]


def learn(dataset, out):
    torch.set_num_threads(1)
    for task in TASKS:
        run.learn(out, Dataset(dataset), task, LEARN, MEMORY)


def contents(out):
    """Everything of a run that must be the same bits: hashes of all tensors, results, curves without clocks."""
    manifest = store.read_manifest(out)
    curves = manifest["record"]["curves"]
    for curve in curves.values():
        for entry in curve:
            del entry["seconds"]
    return manifest
