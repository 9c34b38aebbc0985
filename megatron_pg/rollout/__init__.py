"""Where groups come from: recorded rollouts, tasks with rewards, inference servers."""

from .base import (
    GroupStream,
    HoldsOut,
    Identified,
    PromptSource,
    RolloutSource,
    Tokenizer,
    WeightExporter,
)
from .client import RolloutServerError, api_key_problem, base_url_problem
from .dialects import Dialect, dialect_problem
from .named import load_callable
from .openai_server import OpenAIServerSource
from .probe import ServerCapabilities, health_path_problem
from .prompts import ANSWER_EXTRACTORS, FilePrompts, HeldOutPrompts, ReasoningGymTask, TooLong
from .recorded import RecordedRollouts
from .reload import RELOAD_PLANS, ReloadCall, ReloadPlan
from .retry import RetryPolicy
from .rewards import (
    REWARDS,
    BatchedReward,
    CombinedReward,
    FormatReward,
    Judgement,
    NamedRewards,
    RewardError,
    RewardFunction,
    RewardSettings,
    make_groups,
    math_score,
    math_verify_reward,
    reward_settings,
)
from .streams import SampledRollouts, held_out_prompts
from .values import Message, Prompt, Response, SamplingParams

__all__ = [
    "ANSWER_EXTRACTORS",
    "RELOAD_PLANS",
    "REWARDS",
    "BatchedReward",
    "CombinedReward",
    "Dialect",
    "FilePrompts",
    "FormatReward",
    "GroupStream",
    "HeldOutPrompts",
    "HoldsOut",
    "Identified",
    "Judgement",
    "Message",
    "NamedRewards",
    "OpenAIServerSource",
    "Prompt",
    "PromptSource",
    "ReasoningGymTask",
    "RecordedRollouts",
    "ReloadCall",
    "ReloadPlan",
    "Response",
    "RetryPolicy",
    "RewardError",
    "RewardFunction",
    "RewardSettings",
    "RolloutServerError",
    "RolloutSource",
    "SampledRollouts",
    "SamplingParams",
    "ServerCapabilities",
    "Tokenizer",
    "TooLong",
    "WeightExporter",
    "api_key_problem",
    "base_url_problem",
    "dialect_problem",
    "health_path_problem",
    "held_out_prompts",
    "load_callable",
    "make_groups",
    "math_score",
    "math_verify_reward",
    "reward_settings",
]
