"""pcl_ext: one frozen user model, task after task, nothing forgotten."""

from pcl_ext import ops
from pcl_ext.batch import PackedBatch
from pcl_ext.model import Backbone, BackboneConfig, MemoryConfig, UserModel, task_loss
from pcl_ext.serve import Predictor
from pcl_ext.store import from_pretrained, save_pretrained, verify
from pcl_ext.task import TaskSpec

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BackboneConfig",
    "MemoryConfig",
    "PackedBatch",
    "Predictor",
    "TaskSpec",
    "UserModel",
    "from_pretrained",
    "ops",
    "save_pretrained",
    "task_loss",
    "verify",
]
