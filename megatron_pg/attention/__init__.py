"""How a tree attends: plan, merge and backends."""

from .backends import ATTENTION_BACKENDS, AttentionInputs
from .interface import (
    available_backends,
    check_backend_name,
    check_softmax_scale,
    prefix_grouped_attention,
    select_backend,
)
from .merge import merge_implementation
from .plan import AttentionPlan, make_attention_plan
from .resident import ResidentKV

__all__ = [
    "ATTENTION_BACKENDS",
    "AttentionInputs",
    "AttentionPlan",
    "ResidentKV",
    "available_backends",
    "check_backend_name",
    "check_softmax_scale",
    "make_attention_plan",
    "merge_implementation",
    "prefix_grouped_attention",
    "select_backend",
]
