"""What a response is worth: rewards by name or of one's own, and the groups that they make."""

from .functions import BatchedReward, CombinedReward, FormatReward, RewardFunction
from .groups import check_prompt_ids, make_groups
from .judging import NamedRewards
from .mathematics import math_score, math_verify_reward
from .pool import RewardError
from .settings import REWARDS, RewardSettings, reward_settings
from .values import Judgement

__all__ = [
    "REWARDS",
    "BatchedReward",
    "CombinedReward",
    "FormatReward",
    "Judgement",
    "NamedRewards",
    "RewardError",
    "RewardFunction",
    "RewardSettings",
    "check_prompt_ids",
    "make_groups",
    "math_score",
    "math_verify_reward",
    "reward_settings",
]
