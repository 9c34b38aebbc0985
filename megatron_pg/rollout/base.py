"""The nouns and protocols of a rollout: prompts, responses, their sources, streams of groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from ..data import Group, Status

Message = dict[str, Any]
"""A chat message: ``role``, ``content`` and what else a chat template reads."""

WeightExporter = Callable[[Path], None]
"""Writes the current policy as a Hugging Face folder."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """What a group is sampled from.

    Attributes:
        prompt_id: becomes the ``group_id``; unique among the prompts of a step.
        prompt_ids: ``[P]`` int64 on the CPU, at least one token.
        metadata: what a reward needs to judge a response (``answer``, a task's entry), and where
            the prompt comes from (``data_source``, text) where that is known.
        text: ``prompt_ids`` as text, special tokens included; empty where it is not known.
        messages: chat messages that the text was made from, where the prompt was given as such.

    Raises:
        ValueError: if ``prompt_ids`` is not a non-empty int64 vector.
    """

    prompt_id: str
    prompt_ids: Tensor
    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    messages: Sequence[Message] | None = None

    def __post_init__(self) -> None:
        _check_tokens(f"prompt_ids of prompt {self.prompt_id!r}", self.prompt_ids)


@dataclass(frozen=True, eq=False, kw_only=True)
class Response:
    """One sampled continuation of a prompt, not yet rewarded.

    An aborted response, and one without tokens, trains nothing: its ``status`` is "aborted", its
    ``loss_mask`` False throughout, whatever was given.

    Attributes:
        response_ids: ``[R]`` int64 on the CPU, end token included; R may be 0.
        text: ``response_ids`` decoded without special tokens; may be lossy.
        rollout_logprobs: ``[R]`` float64 that the engine reported, or None.
        loss_mask: ``[R]`` bool, True where trained; None trains every token.
        status: whether the response ended by itself.
        metadata: copied into the sample.

    Raises:
        ValueError: if the tensors do not have one entry per token, or the status is unknown.
    """

    response_ids: Tensor
    text: str
    rollout_logprobs: Tensor | None = None
    loss_mask: Tensor | None = None
    status: Status = "completed"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_tokens("response_ids", self.response_ids, least=0)
        if self.status not in get_args(Status):
            raise ValueError(f"status={self.status!r} must be one of {', '.join(get_args(Status))}")
        for name in ("rollout_logprobs", "loss_mask"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.response_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} for {len(self.response_ids)} tokens"
                )
        if self.status == "aborted" or not len(self.response_ids):
            object.__setattr__(self, "status", "aborted")
            untrained = torch.zeros_like(self.response_ids, dtype=torch.bool)
            object.__setattr__(self, "loss_mask", untrained)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How responses are sampled. Every engine gets all of it, so no engine default applies.

    Attributes:
        num_generations: samples per prompt.
        max_response_tokens: longest response; a longer one is truncated.
        temperature: 0 is greedy, and then ``num_generations`` must be 1.
        top_k: keep the k likeliest tokens; None keeps all.
        top_p: keep the likeliest tokens of this total probability.
        stop_token_ids: tokens that end a response besides the model's own end token.
        seed: None leaves sampling unseeded.

    Raises:
        ValueError: on a value outside its range.
    """

    num_generations: int
    max_response_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("num_generations", "max_response_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be finite and at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 turns it off")
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids={self.stop_token_ids} must be integers of at least 0")
        if self.seed is not None and not (_is_int(self.seed) and self.seed >= 0):
            raise ValueError(f"seed={self.seed!r} must be None or an integer of at least 0")
        if self.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"num_generations={self.num_generations} greedy samples of a prompt are all equal; "
                "set temperature > 0 or num_generations=1"
            )


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


def _check_tokens(name: str, tokens: Tensor, least: int = 1) -> None:
    if tokens.ndim != 1 or tokens.dtype != torch.int64 or len(tokens) < least:
        raise ValueError(
            f"{name} must be {'a non-empty' if least else 'an'} int64 vector, got shape "
            f"{tuple(tokens.shape)} and dtype {tokens.dtype}"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
