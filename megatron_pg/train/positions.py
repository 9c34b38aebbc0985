"""Samples stay within the positions that their model was made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..data import Group
from ..rollout import Prompt, ReasoningGymTask


def recorded_position_problems(groups: Sequence[Group], max_positions: int | None) -> Iterator[str]:
    """The longest sample of recorded groups, and how many there are, where a model has less."""
    if max_positions is None:
        return
    lens = [max(len(s.tokens) for s in group.samples) for group in groups]
    if lens and max(lens) > max_positions:
        longest = lens.index(max(lens))
        too_long = sum(length > max_positions for length in lens)
        yield (
            f"group {groups[longest].group_id!r} has a sample of {lens[longest]} tokens, "
            f"{_made_for(max_positions, lens[longest])} ({too_long} of {len(groups)} groups have "
            "one that is too long)"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundedTask(ReasoningGymTask):
    """A task that refuses prompts whose longest response would end beyond a model's positions.

    Attributes:
        max_positions: of the model; None where it has no limit.
        max_response_tokens: of sampling.
    """

    max_positions: int | None
    max_response_tokens: int

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """See ``ReasoningGymTask.prompts``.

        Raises:
            ValueError: also on a prompt that leaves no room for a response.
        """
        prompts = super().prompts(start, count)
        for prompt in prompts:
            length = len(prompt.prompt_ids) + self.max_response_tokens
            if self.max_positions is not None and length > self.max_positions:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} of {len(prompt.prompt_ids)} tokens with "
                    f"rollout.max_response_tokens={self.max_response_tokens} is {length} tokens, "
                    + _made_for(self.max_positions, length)
                )
        return prompts


def _made_for(max_positions: int, needed: int) -> str:
    return (
        f"the model was made for max_position_embeddings={max_positions}; leave it out or shorten "
        f"it, or set model.max_position_embeddings={needed} to train positions beyond that"
    )
