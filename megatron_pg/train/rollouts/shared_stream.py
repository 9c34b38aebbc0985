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
        self._version = 0
        self._version_ahead: int | None = None

    @property
    def lag_steps(self) -> int:
        """Updates of the weights since the groups that come next were asked for, if they were."""
        return 0 if self._version_ahead is None else self._version - self._version_ahead

    def start(self) -> object | None:
        """Wait until groups can be taken; what the source can do, as ``RolloutSource.start``."""
        return on_all_ranks(lambda: None if self.stream is None else self.stream.start())

    def next_groups(self, num_groups: int) -> dict[int, Group]:
        """Of the next groups those that this rank has, by number."""
        groups = self._call(lambda stream: stream.next_groups(num_groups)) or []
        self._version_ahead = None
        numbers = [] if self.stream is None else self.stream.numbers(num_groups)
        return dict(zip(numbers, groups))

    def held_out_groups(self, num_prompts: int | None, num_generations: int) -> dict[int, Group]:
        """``GroupStream.held_out_groups`` of all ranks, on the first one; none on the others."""
        return gather_groups(
            self._call(lambda s: s.held_out_groups(num_prompts, num_generations)) or {}
        )

    def ask_ahead(self, num_groups: int) -> None:
        """See ``GroupStream.ask_ahead``."""
        self._call(lambda stream: stream.ask_ahead(num_groups))
        self._version_ahead = self._version

    def wait(self) -> None:
        """See ``GroupStream.wait``; no rank waits for the others."""
        if self.stream is not None:
            self.stream.wait()

    def close(self) -> None:
        """See ``GroupStream.close``; on this rank alone, whatever became of the others."""
        if self.stream is not None:
            self.stream.close()

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """See ``RolloutSource.update_weights``."""

        def update() -> None:
            if self.stream is not None:
                self.stream.update_weights(export, version)

        on_all_ranks(update)
        self._version = version

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


def gather_groups(own: Mapping[int, Group]) -> dict[int, Group]:
    """The groups of all ranks by number, on the first one; none on the others. A collective."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(dict(own), parts)
    return {number: group for part in parts or [] for number, group in part.items()}
