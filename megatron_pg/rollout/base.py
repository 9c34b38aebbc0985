"""The protocols of a rollout: sources of prompts and responses, streams of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..data import Group
from .values import Prompt, Response, SamplingParams

WeightExporter = Callable[[Path], None]
"""Writes the current policy as a Hugging Face folder."""


class RolloutSource:
    """Samples responses: an inference server, the trained model itself, or one of your own.

    A subclass gives ``generate``; what else it does not say is what a source needs that one process
    calls and that knows nothing of the weights. A source that asks ahead (``run.rollout_ahead``) is
    called on a thread, and by nobody else meanwhile.

    Attributes:
        on_all_ranks: whether every rank of the job takes part in ``generate``; else the first one
            alone calls it.
    """

    on_all_ranks: bool = False

    def start(self) -> object | None:
        """Wait until responses can be sampled; every rank takes part.

        Returns:
            Something whose text says what the source can do, or None.
        """
        return None

    def numbers(self, num_prompts: int) -> Sequence[int]:
        """Which of the next ``num_prompts`` prompts this rank's replica of the model answers."""
        return range(num_prompts)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[tuple[Response, ...]] | None:
        """``params.num_generations`` responses of every prompt, in the prompts' order.

        Args:
            prompts: those of ``numbers``.
            params: how to sample.

        Returns:
            None on a rank that only helps another one.
        """
        raise NotImplementedError(f"{type(self).__name__} has no generate()")

    def cancel(self) -> None:
        """Make a ``generate`` that another thread is in raise soon; one that cannot goes on."""

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Make later responses come from the current policy; every rank takes part.

        Args:
            export: writes the policy as a Hugging Face folder, together with all ranks; not called
                by a source that reads the trained parameters in place.
            version: number of the policy, kept in the responses' metadata.
        """


@runtime_checkable
class GroupStream(Protocol):
    """Where a trainer takes rewarded groups from, recorded or sampled; resumable."""

    @property
    def on_all_ranks(self) -> bool:
        """See ``RolloutSource.on_all_ranks``."""
        ...

    def start(self) -> object | None:
        """See ``RolloutSource.start``."""
        ...

    def numbers(self, num_groups: int) -> Sequence[int]:
        """See ``RolloutSource.numbers``."""
        ...

    def next_groups(self, num_groups: int) -> list[Group]:
        """Of the next ``num_groups`` groups those of ``numbers``.

        Fewer when the stream has ended, none on a rank that only helps another one.
        """
        ...

    def held_out_groups(self, num_prompts: int | None, num_generations: int) -> dict[int, Group]:
        """Groups of prompts that training never sees, by number, those of ``numbers``.

        The same prompts at every call, None for all of them; the position stays as it is.

        Raises:
            ValueError: if the stream cannot hold prompts out, or not say how many there are.
        """
        ...

    def ask_ahead(self, num_groups: int) -> None:
        """Have sampled meanwhile what the next ``next_groups(num_groups)`` gives.

        The position stays as it is; what goes wrong is raised by that call.
        """
        ...

    def wait(self) -> None:
        """Until nothing is being sampled."""
        ...

    def close(self) -> None:
        """Give up what was asked ahead."""
        ...

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """See ``RolloutSource.update_weights``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream; JSON-serializable."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        ...


@runtime_checkable
class PromptSource(Protocol):
    """An endless, indexable list of prompts."""

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """Prompts number ``start`` to ``start + count - 1``; the same ones at every call."""
        ...


@runtime_checkable
class HoldsOut(Protocol):
    """Prompts of which some are never trained."""

    def held_out(self) -> PromptSource:
        """Those."""
        ...


@runtime_checkable
class Identified(Protocol):
    """Prompts that can be told from others, so that no run is resumed with other ones."""

    def identity(self) -> dict[str, Any]:
        """What fixes the prompts and their order; JSON-serializable."""
        ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
