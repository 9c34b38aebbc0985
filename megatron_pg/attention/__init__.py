"""How a tree attends: plan, merge and backends."""

from .backends import ATTENTION_BACKENDS, AttentionBackend, AttentionInputs
from .interface import (
    available_backends,
    check_backend_name,
    describe_backend,
    prefix_grouped_attention,
    select_backend,
)
from .kernels import merge_implementation
from .kinds import AttentionKind
from .plan import AttentionPlan, make_attention_plan
from .resident import ResidentKV, accumulation_dtype

__all__ = [
    "ATTENTION_BACKENDS",
    "AttentionBackend",
    "AttentionInputs",
    "AttentionKind",
    "AttentionPlan",
    "ResidentKV",
    "accumulation_dtype",
    "available_backends",
    "check_backend_name",
    "describe_backend",
    "make_attention_plan",
    "merge_implementation",
    "prefix_grouped_attention",
    "select_backend",
]
