"""Mean reward on prompts that training never sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import TrainConfig
from .shared_stream import SharedStream


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
    run = config.run
    try:
        rewards = stream.held_out_rewards(run.eval_prompts, run.eval_generations)
    except ValueError as error:
        raise ValueError(f"run.eval_prompts={run.eval_prompts}: {error}; or set it to 0") from error
    if not rewards:
        raise ValueError(
            "every response to a held-out prompt was aborted or empty: there is nothing to judge; "
            "see the server's log, or set run.eval_prompts=0"
        )
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)
    return Evaluation(mean, math.sqrt(variance / len(rewards)), len(rewards))
