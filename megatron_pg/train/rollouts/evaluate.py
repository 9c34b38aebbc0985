"""Rewards on prompts that training never sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...data import Group, without_aborted
from ...parallel import on_first_rank
from ...rollout import (
    BatchedReward,
    NamedRewards,
    PromptSource,
    RewardFunction,
    held_out_prompts,
)
from ..config import RunConfig
from .own_rewards import mean_rewards, own_reward_sums
from .shared_stream import SharedStream


@dataclass(frozen=True)
class Evaluation:
    """Rewards of responses to held-out prompts.

    Attributes:
        mean: over prompts, of the mean over their samples.
        standard_error: of that mean, over prompts.
        num_prompts: prompts judged: those with a response that was not aborted.
        metrics: these and others as ``METRICS`` names them.
    """

    mean: float
    standard_error: float
    num_prompts: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def evaluate(run: RunConfig, stream: SharedStream) -> tuple[Evaluation, dict[int, Group]]:
    """Sample and judge ``run.eval_prompts`` held-out prompts; every rank takes part.

    The prompts and the seed, and so what is compared, are the same at every call.

    Args:
        run: settings of the run.
        stream: of the run; its position stays as it is.

    Returns:
        The evaluation, and on the first rank its groups by number.

    Raises:
        ValueError: if every response was aborted, a reward calls one of its numbers as a metric is
            called, or the stream has no prompts that could be held out.
    """
    try:
        groups = stream.held_out_groups(num_eval_prompts(run), run.eval_generations)
    except ValueError as error:
        raise _refusal(run, error) from error
    return on_first_rank(lambda: judge(groups, run.eval_generations)), groups


def check_held_out(
    run: RunConfig, task: PromptSource, reward: RewardFunction | BatchedReward
) -> None:
    """Look at the held-out prompts that ``run`` asks for.

    Raises:
        ValueError: if the task cannot give them, or the reward needs what one of them lacks.
    """
    if not run.eval_prompts:
        return
    try:
        prompts = held_out_prompts(task, num_eval_prompts(run))
        if isinstance(reward, NamedRewards):
            for prompt in prompts:
                reward.check(prompt)
    except ValueError as error:
        raise _refusal(run, error) from error


def num_eval_prompts(run: RunConfig) -> int | None:
    """``run.eval_prompts`` as a number; None for all of them."""
    return None if run.eval_prompts == "all" else run.eval_prompts


def judge(groups: Mapping[int, Group], num_generations: int) -> Evaluation:
    """Means over held-out groups, over all of them and over those of every data source.

    Args:
        groups: by number.
        num_generations: responses that were asked for per prompt.

    Raises:
        ValueError: if every response was aborted, or a reward calls one of its numbers as a metric
            is called.
    """
    judged = without_aborted(groups[number] for number in sorted(groups))
    if not judged:
        raise ValueError(
            "every response to a held-out prompt was aborted or empty: there is nothing to judge; "
            "see the server's log, or set run.eval_prompts=0"
        )
    means = [float(group.rewards.mean()) for group in judged]
    mean = sum(means) / len(means)
    variance = sum((r - mean) ** 2 for r in means) / max(len(means) - 1, 1)
    error = math.sqrt(variance / len(means))
    metrics = {"eval/prompts": float(len(means)), "eval/standard_error": error}
    metrics |= _reward_metrics("eval", judged, num_generations)
    for source in _sources(judged):
        own = [group for group in judged if _source(group) == source]
        metrics |= _reward_metrics(f"eval/{source}", own, num_generations)
    metrics |= {
        f"eval/reward/{name}": value
        for name, value in mean_rewards([own_reward_sums(judged)]).items()
    }
    return Evaluation(mean, error, len(means), metrics)


def pass_at(rewards: Sequence[float], k: int) -> float:
    """Expected best of ``k`` of the rewards, drawn without replacement.

    Of rewards 0 and 1 this is the unbiased estimator of pass@k (arXiv 2107.03374).
    """
    ranked = sorted(rewards)
    ways = math.comb(len(ranked), k)
    return sum(math.comb(i, k - 1) * reward for i, reward in enumerate(ranked)) / ways


def _reward_metrics(prefix: str, groups: Sequence[Group], n: int) -> dict[str, float]:
    """mean@n and pass@k of some groups; those with fewer judged responses have no pass@k."""
    means = [float(group.rewards.mean()) for group in groups]
    metrics = {f"{prefix}/reward/mean@{n}": sum(means) / len(means)}
    for k in _powers_of_two(n):
        best = [pass_at(g.rewards.tolist(), k) for g in groups if len(g.samples) >= k]
        if best:
            metrics[f"{prefix}/reward/pass@{k}"] = sum(best) / len(best)
    return metrics


def _powers_of_two(n: int) -> list[int]:
    """Those below n, then n."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def _source(group: Group) -> str | None:
    source = group.samples[0].metadata.get("data_source")
    return source if isinstance(source, str) else None


def _sources(groups: Iterable[Group]) -> list[str]:
    return sorted({source for group in groups if (source := _source(group)) is not None})


def _refusal(run: RunConfig, error: ValueError) -> ValueError:
    return ValueError(f"run.eval_prompts={run.eval_prompts}: {error}; or set it to 0")
