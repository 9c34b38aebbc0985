"""Where groups come from: recorded rollouts, tasks with rewards, inference servers."""

from .base import (
    GroupStream,
    HoldsOut,
    Prompt,
    PromptSource,
    Response,
    RolloutSource,
    SamplingParams,
    Tokenizer,
    WeightExporter,
)
from .client import RolloutServerError, api_key_problem, base_url_problem
from .dialects import dialect_problem
from .named import load_callable
from .openai_server import OpenAIServerSource
from .probe import ServerCapabilities, health_path_problem
from .recorded import RecordedRollouts
from .reload import RELOAD_PLANS, ReloadCall, ReloadPlan
from .retry import RetryPolicy
from .reward import (
    CombinedReward,
    FormatReward,
    RewardFunction,
    make_groups,
    math_verify_reward,
)
from .streams import SampledRollouts, held_out_prompts
from .tasks import ANSWER_EXTRACTORS, ReasoningGymTask

__all__ = [
    "ANSWER_EXTRACTORS",
    "RELOAD_PLANS",
    "CombinedReward",
    "FormatReward",
    "GroupStream",
    "HoldsOut",
    "OpenAIServerSource",
    "Prompt",
    "PromptSource",
    "ReasoningGymTask",
    "RecordedRollouts",
    "ReloadCall",
    "ReloadPlan",
    "Response",
    "RetryPolicy",
    "RewardFunction",
    "RolloutServerError",
    "RolloutSource",
    "SampledRollouts",
    "SamplingParams",
    "ServerCapabilities",
    "Tokenizer",
    "WeightExporter",
    "api_key_problem",
    "base_url_problem",
    "dialect_problem",
    "health_path_problem",
    "held_out_prompts",
    "load_callable",
    "make_groups",
    "math_verify_reward",
]
