"""A stream of groups whose ranks each hold their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from ...data import Group
from ...parallel import on_all_ranks, on_first_rank
from ...rollout import GroupStream, WeightExporter

T = TypeVar("T")


class SharedStream:
    """A stream that all ranks of the job call together; an error on one is raised on all.

    Args:
        stream: the stream; None on ranks where the first one's is recorded.
        is_first: whether this is rank 0.
    """

    def __init__(self, stream: GroupStream | None, *, is_first: bool) -> None:
        assert stream is not None or not is_first
        self.stream = stream
        self.is_first = is_first

    def start(self) -> object | None:
        """Wait until groups can be taken; what the source can do, as ``RolloutSource.start``."""
        return on_all_ranks(lambda: None if self.stream is None else self.stream.start())

    def next_groups(self, num_groups: int) -> dict[int, Group]:
        """Of the next groups those that this rank has, by number."""
        groups = self._call(lambda stream: stream.next_groups(num_groups)) or []
        numbers = [] if self.stream is None else self.stream.numbers(num_groups)
        return dict(zip(numbers, groups))

    def held_out_rewards(self, num_prompts: int, num_generations: int) -> list[float]:
        """``GroupStream.held_out_rewards`` of all ranks, in the order of the prompts."""
        own = self._call(lambda s: s.held_out_rewards(num_prompts, num_generations)) or {}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        rewards = {number: reward for part in parts for number, reward in part.items()}
        return [rewards[number] for number in sorted(rewards)]

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """See ``RolloutSource.update_weights``."""

        def update() -> None:
            if self.stream is not None:
                self.stream.update_weights(export, version)

        on_all_ranks(update)

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, as the first rank knows it."""
        return dict(on_first_rank(lambda: self._own().state_dict()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._call(lambda stream: stream.load_state_dict(state))

    def _call(self, action: Callable[[GroupStream], T]) -> T | None:
        """What ``action`` returns on the ranks that call the stream, None on the others."""

        def call() -> T | None:
            stream = self.stream
            return action(stream) if stream and (self.is_first or stream.on_all_ranks) else None

        return on_all_ranks(call)

    def _own(self) -> GroupStream:
        assert self.stream is not None
        return self.stream
