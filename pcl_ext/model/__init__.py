"""Backbone, prompts, heads, and the user model that holds them."""

from pcl_ext.model.backbone import Backbone, freeze
from pcl_ext.model.config import BackboneConfig, MemoryConfig
from pcl_ext.model.encoded import Encoded, Piece
from pcl_ext.model.layout import LayerPrefix
from pcl_ext.model.loss import task_loss
from pcl_ext.model.memories import ContextualPrompt, Memory, hashed_text_vector
from pcl_ext.model.task_module import Task
from pcl_ext.model.user_model import UserModel
from pcl_ext.model.user_state import UserState

__all__ = [
    "Backbone",
    "BackboneConfig",
    "ContextualPrompt",
    "Encoded",
    "LayerPrefix",
    "Memory",
    "MemoryConfig",
    "Piece",
    "Task",
    "UserModel",
    "UserState",
    "freeze",
    "hashed_text_vector",
    "task_loss",
]
