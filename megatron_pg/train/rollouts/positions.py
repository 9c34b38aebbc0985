"""Samples stay within the positions that their model was made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...data import Group
from ...rollout import HoldsOut, Prompt, PromptSource


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


@dataclass(frozen=True, eq=False)
class BoundedPrompts:
    """Prompts that are refused where the longest response would end beyond a model's positions.

    Attributes:
        task: where they come from.
        max_positions: of the model.
        max_response_tokens: of sampling.
    """

    task: PromptSource
    max_positions: int
    max_response_tokens: int

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """See ``PromptSource.prompts``.

        Raises:
            ValueError: also on a prompt that leaves no room for a response.
        """
        prompts = self.task.prompts(start, count)
        for prompt in prompts:
            length = len(prompt.prompt_ids) + self.max_response_tokens
            if length > self.max_positions:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} of {len(prompt.prompt_ids)} tokens with "
                    f"rollout.max_response_tokens={self.max_response_tokens} is {length} tokens, "
                    + _made_for(self.max_positions, length)
                )
        return prompts

    def __len__(self) -> int:
        """Prompts of the task. Raises TypeError where it does not say how many it has."""
        return len(self.task)  # type: ignore[arg-type]

    def held_out(self) -> PromptSource:
        """See ``HoldsOut.held_out``. Raises ValueError where the task holds nothing out."""
        if not isinstance(self.task, HoldsOut):
            raise ValueError(
                f"{type(self.task).__name__} has no held_out(), which gives the prompts that "
                "training never sees"
            )
        return replace(self, task=self.task.held_out())


def _made_for(max_positions: int, needed: int) -> str:
    return (
        f"the model was made for max_position_embeddings={max_positions}; leave it out or shorten "
        f"it, or set model.max_position_embeddings={needed} to train positions beyond that"
    )
