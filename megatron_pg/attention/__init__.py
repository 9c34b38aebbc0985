"""How a tree attends: plan, merge and backends."""

from .backends import AttentionInputs
from .interface import available_backends, prefix_grouped_attention, select_backend
from .plan import AttentionPlan, make_attention_plan

__all__ = [
    "AttentionInputs",
    "AttentionPlan",
    "available_backends",
    "make_attention_plan",
    "prefix_grouped_attention",
    "select_backend",
]
