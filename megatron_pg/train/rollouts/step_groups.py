"""The groups of a step, and how they came."""

from __future__ import annotations

from collections.abc import Sequence

from ...data import Group
from ..config import TrainConfig
from .filter_groups import groups_with_spread, recorded_with_spread
from .own_rewards import own_reward_metrics
from .shared_stream import SharedStream
from .stream import recorded_stream


def next_step_groups(
    config: TrainConfig, stream: SharedStream, *, is_last: bool
) -> tuple[dict[int, Group], dict[str, float]]:
    """This rank's groups of the next step by number, and metrics; every rank takes part.

    Args:
        config: of the run.
        stream: of the run. Asks ahead for the step after, where the run does so.
        is_last: whether there is none.
    """
    run, settings = config.run, config.algorithm.filter_groups
    metrics = {"rollout/lag_steps": float(stream.lag_steps)} if run.rollout_ahead else {}
    if settings.enable:
        groups, told = groups_with_spread(stream, run.groups_per_step, settings)
        metrics |= told
    else:
        groups = stream.next_groups(run.groups_per_step)
    if run.rollout_ahead and not is_last:
        stream.ask_ahead(run.groups_per_step)
    return groups, metrics | own_reward_metrics(groups)


def first_step_groups(config: TrainConfig, groups: Sequence[Group]) -> list[Group]:
    """The groups of a recorded run's first step: some twice where it takes more than there are.

    Raises:
        ValueError: as ``groups_with_spread`` does.
    """
    stream, settings = recorded_stream(config, groups), config.algorithm.filter_groups
    if settings.enable:
        return recorded_with_spread(stream, config.run.groups_per_step, settings)
    return stream.next_groups(config.run.groups_per_step)
