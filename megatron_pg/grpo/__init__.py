"""The GRPO step as a library: groups in, gradients out, for any training loop on Megatron-Core."""

from .advantages import compute_advantages
from .batch import Minibatch, StepBatch, pack_batch
from .messages import decode_groups, encode_groups
from .offload import Offloaded
from .packing import (
    PackingConfig,
    TokenCounts,
    count_tokens,
    plan_all_replicas,
    plan_rows_of_replica,
)
from .passes import HeadConfig, compute_logprobs, microbatch_loss, train_pass
from .placement import Placement, place_groups
from .reference import with_ref_logprobs
from .replay import RouteRecord, check_carried, replayed_routes
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
    "Offloaded",
    "PackingConfig",
    "Placement",
    "PrefixGroupConfig",
    "Ranks",
    "Replicas",
    "RouteRecord",
    "StepBatch",
    "StepShape",
    "TokenCounts",
    "check_carried",
    "compute_advantages",
    "compute_logprobs",
    "count_tokens",
    "decode_groups",
    "encode_groups",
    "microbatch_loss",
    "pack_batch",
    "place_groups",
    "plan_all_replicas",
    "plan_rows_of_replica",
    "replayed_routes",
    "total_over_replicas",
    "train_pass",
    "with_ref_logprobs",
]
