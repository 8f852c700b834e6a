"""What a task stores. A new kind of memory is a new file here and its name in the configuration."""

from pcl_ext.model.memories.base import Memory
from pcl_ext.model.memories.contextual import ContextualPrompt, hashed_text_vector
from pcl_ext.model.memories.earlier import EarlierReadouts
from pcl_ext.model.memories.item_memory import ItemMemory
from pcl_ext.model.memories.learned_pool import LearnedPool
from pcl_ext.model.memories.low_rank import LowRankPrompts
from pcl_ext.model.memories.prompts import LayerPrompt, PrefixPrompt, TailPrompt
from pcl_ext.model.memories.states import LastState, MeanStates

__all__ = [
    "ContextualPrompt",
    "EarlierReadouts",
    "ItemMemory",
    "LayerPrompt",
    "LastState",
    "LearnedPool",
    "LowRankPrompts",
    "MeanStates",
    "Memory",
    "PrefixPrompt",
    "TailPrompt",
    "hashed_text_vector",
]
