"""Mean reward on prompts that training never sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..data import without_aborted
from ..rollout import ReasoningGymTask, SampledRollouts, make_groups
from .config import TrainConfig
from .ranks import from_first_rank
from .shared_stream import SharedStream, on_first_rank


@dataclass(frozen=True)
class Evaluation:
    """Mean reward over held-out prompts.

    Attributes:
        mean: over prompts, of the mean over their samples.
        standard_error: of that mean, over prompts.
        num_prompts: prompts judged: those with a response that was not aborted.
    """

    mean: float
    standard_error: float
    num_prompts: int


def evaluate(config: TrainConfig, stream: SharedStream) -> Evaluation:
    """Sample and judge ``run.eval_prompts`` held-out prompts; every rank takes part.

    The prompts, the seed and so the comparison before and after training are the same.

    Args:
        config: of the run; its rollouts are sampled.
        stream: of the run; its position stays as it is.

    Raises:
        ValueError: if every response was aborted, or if the stream has no prompts that could be
            held out.
    """
    sampled = stream.stream
    if not isinstance(sampled, SampledRollouts) or not isinstance(sampled.task, ReasoningGymTask):
        raise ValueError(
            f"run.eval_prompts={config.run.eval_prompts} needs rollouts that are sampled for a "
            "reasoning-gym task, which can hold prompts out; set it to 0"
        )
    run = config.run
    task = sampled.task.held_out()
    params = replace(sampled.params, num_generations=run.eval_generations)
    reward = task if isinstance(sampled.reward, ReasoningGymTask) else sampled.reward

    def judge() -> list[float]:
        prompts = task.prompts(0, run.eval_prompts)
        groups = make_groups(prompts, sampled.source.generate(prompts, params), reward)
        return [float(group.rewards.mean()) for group in without_aborted(groups)]

    if stream.needs_all_ranks:
        # Rewards may be random, so that the first rank's count.
        rewards = from_first_rank(judge())
    else:
        rewards = on_first_rank(judge, stream.is_first)
    if not rewards:
        raise ValueError(
            "every response to a held-out prompt was aborted or empty: there is nothing to judge; "
            "see the server's log, or set run.eval_prompts=0"
        )
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
    return Evaluation(mean, math.sqrt(variance / len(rewards)), len(rewards))
