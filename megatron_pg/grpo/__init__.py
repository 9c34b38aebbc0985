"""The GRPO step as a library: groups in, gradients out, for any training loop on Megatron-Core."""

from .batch import Minibatch, StepBatch
from .packing import (
    PackingConfig,
    TokenCounts,
    active_ffn_hidden_size,
    cost_model_of,
    count_tokens,
    plan_all_replicas,
)
from .passes import HeadConfig, compute_logprobs, microbatch_loss, train_pass
from .replicas import MegatronReplicas, Ranks, Replicas, total_over_replicas
from .settings import GrpoConfig, PrefixGroupConfig
from .shape import StepShape
from .step import GrpoStep

__all__ = [
    "GrpoConfig",
    "GrpoStep",
    "HeadConfig",
    "MegatronReplicas",
    "Minibatch",
    "PackingConfig",
    "PrefixGroupConfig",
    "Ranks",
    "Replicas",
    "StepBatch",
    "StepShape",
    "TokenCounts",
    "active_ffn_hidden_size",
    "compute_logprobs",
    "cost_model_of",
    "count_tokens",
    "microbatch_loss",
    "plan_all_replicas",
    "total_over_replicas",
    "train_pass",
]
