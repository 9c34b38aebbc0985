"""What a step that asks for groups with spread gets, on ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_pg.data import Group
from megatron_pg.rollout import SampledRollouts, SamplingParams, make_groups
from megatron_pg.train.config import FilterGroupsConfig
from megatron_pg.train.rollouts.filter_groups import groups_with_spread
from megatron_pg.train.rollouts.shared_stream import SharedStream
from tests.ranks import process_group
from tests.train.held_out import Source, Task

PARAMS = SamplingParams(num_generations=4, max_response_tokens=5)


def take(
    num_steps: int, num_groups: int, settings: FilterGroupsConfig, source: dict[str, Any]
) -> list[Any]:
    """Of every step this rank's groups as (place, name), the metrics, and the position after it."""
    with process_group():
        task = Task(None)
        sampled = SampledRollouts(task, Source(None, 50, **source), task, PARAMS)
        stream = SharedStream(sampled, is_first=dist.get_rank() == 0)
        steps = []
        for _ in range(num_steps):
            groups, metrics = groups_with_spread(stream, num_groups, settings)
            names = [(place, group.group_id) for place, group in sorted(groups.items())]
            steps.append((names, metrics, stream.state_dict()["num_taken"]))
        return steps


def recorded(numbers: list[int]) -> list[Group]:
    """The groups of these training prompts."""
    task, source = Task(None), Source(None, 50)
    prompts = [task.prompts(number, 1)[0] for number in numbers]
    return make_groups(prompts, source.generate(prompts, PARAMS), task)
