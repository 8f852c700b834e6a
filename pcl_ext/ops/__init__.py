"""The ops: checked, differentiable, fused where the compiled module is there and plain PyTorch elsewhere."""

from pcl_ext.ops import reference
from pcl_ext.ops._native import has_fused, native_build, native_status
from pcl_ext.ops.attention_plan import AttentionPlan, attention_plan
from pcl_ext.ops.catalogue_cross_entropy import catalogue_cross_entropy
from pcl_ext.ops.embed import embed
from pcl_ext.ops.feed_forward import feed_forward
from pcl_ext.ops.gather_histories import gather_histories
from pcl_ext.ops.linear import linear
from pcl_ext.ops.newest_attention import newest_attention
from pcl_ext.ops.plan_batches import plan_batches
from pcl_ext.ops.prompt_attention import prompt_attention
from pcl_ext.ops.to_packed import to_packed
from pcl_ext.ops.to_padded import to_padded

__all__ = [
    "AttentionPlan",
    "attention_plan",
    "catalogue_cross_entropy",
    "embed",
    "feed_forward",
    "gather_histories",
    "has_fused",
    "linear",
    "native_build",
    "native_status",
    "newest_attention",
    "plan_batches",
    "prompt_attention",
    "reference",
    "to_packed",
    "to_padded",
]
