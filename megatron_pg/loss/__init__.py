"""What is optimised: logprobs, advantages, policy losses and their aggregation."""

from .advantage import (
    ADVANTAGE_ESTIMATORS,
    GroupAdvantages,
    RewardGroups,
    group_advantages,
    overlong_penalty,
    register_advantage_estimator,
)
from .aggregate import AGGREGATION_MODES, aggregation_weights
from .grpo import LOSS_SHARES, grpo_loss, metric_means
from .head_memory import head_bytes
from .importance import IMPORTANCE_BOUNDS, importance_weights
from .kl import KL_KINDS, kl_in_reward, kl_of_samples, kl_penalty
from .logprobs import vocab_parallel_logprobs
from .policy import POLICY_LOSSES, PolicyLossConfig, register_policy_loss
from .predictors import PredictorPlan, gather_predictors, plan_predictors

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "AGGREGATION_MODES",
    "GroupAdvantages",
    "IMPORTANCE_BOUNDS",
    "KL_KINDS",
    "LOSS_SHARES",
    "POLICY_LOSSES",
    "PolicyLossConfig",
    "PredictorPlan",
    "RewardGroups",
    "aggregation_weights",
    "gather_predictors",
    "group_advantages",
    "grpo_loss",
    "head_bytes",
    "importance_weights",
    "kl_in_reward",
    "kl_of_samples",
    "kl_penalty",
    "metric_means",
    "overlong_penalty",
    "plan_predictors",
    "register_advantage_estimator",
    "register_policy_loss",
    "vocab_parallel_logprobs",
]
