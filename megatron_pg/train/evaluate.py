"""Mean reward on prompts that training never sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..rollout import ReasoningGymTask, SampledRollouts, make_groups
from .config import TrainConfig
from .ranks import from_first_rank
from .sources import SharedStream


@dataclass(frozen=True)
class Evaluation:
    """Mean reward over held-out prompts.

    Attributes:
        mean: over prompts, of the mean over their samples.
        standard_error: of that mean, over prompts.
        num_prompts: prompts judged.
    """

    mean: float
    standard_error: float
    num_prompts: int


def evaluate(config: TrainConfig, stream: SharedStream) -> Evaluation:
    """Sample and judge ``run.eval_prompts`` held-out prompts; every rank takes part.

    The prompts, the seed and so the comparison before and after training are the same.

    Raises:
        ValueError: if the run's rollouts are recorded: there is nothing to sample from.
    """
    sampled = stream.stream
    if not isinstance(sampled, SampledRollouts) or not isinstance(sampled.task, ReasoningGymTask):
        raise ValueError(
            "run.eval_prompts needs a source that samples; set it to 0 with recorded rollouts"
        )
    run = config.run
    task = sampled.task.held_out()
    params = replace(sampled.params, num_generations=run.eval_generations)
    rewards = None
    if stream.needs_all_ranks or stream.is_first:
        prompts = task.prompts(0, run.eval_prompts)
        responses = sampled.source.generate(prompts, params)
        reward = task if isinstance(sampled.reward, ReasoningGymTask) else sampled.reward
        groups = make_groups(prompts, responses, reward)
        rewards = [float(group.rewards.mean()) for group in groups]
    rewards = from_first_rank(rewards)
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
    return Evaluation(mean, math.sqrt(variance / len(rewards)), len(rewards))
