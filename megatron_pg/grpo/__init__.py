"""The GRPO step as a library: groups in, gradients out, for any training loop on Megatron-Core."""

from .advantages import compute_advantages
from .batch import Minibatch, StepBatch, pack_batch
from .messages import decode_groups, encode_groups
from .offload import Offloaded
from .packing import plan_all_replicas, plan_rows_of_replica
from .packing_config import PackingConfig, row_cost_model
from .passes import HeadConfig, compute_logprobs, microbatch_loss, train_pass
from .placement import Placement, place_groups, trained_minibatches
from .reference import with_ref_logprobs
from .replay import RouteRecord, check_carried, replayed_routes
from .replicas import MegatronReplicas, Ranks, Replicas, total_over_replicas
from .settings import GrpoConfig, PrefixGroupConfig
from .shape import StepShape
from .step import GrpoStep
from .token_counts import TokenCounts, count_tokens

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
    "row_cost_model",
    "total_over_replicas",
    "train_pass",
    "trained_minibatches",
    "with_ref_logprobs",
]
