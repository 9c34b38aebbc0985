"""The nouns of a rollout: prompts, their responses, and how they are sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from ..data import Status

Message = dict[str, Any]
"""A chat message: ``role``, ``content`` and what else a chat template reads."""


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
        routed_experts: experts of the prompt's and the response's tokens, as ``data.Sample`` has
            them.
        status: whether the response ended by itself.
        metadata: copied into the sample.

    Raises:
        ValueError: if the tensors do not have one entry per token, or the status is unknown.
    """

    response_ids: Tensor
    text: str
    rollout_logprobs: Tensor | None = None
    loss_mask: Tensor | None = None
    routed_experts: Tensor | None = None
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


def _check_tokens(name: str, tokens: Tensor, least: int = 1) -> None:
    if tokens.ndim != 1 or tokens.dtype != torch.int64 or len(tokens) < least:
        raise ValueError(
            f"{name} must be {'a non-empty' if least else 'an'} int64 vector, got shape "
            f"{tuple(tokens.shape)} and dtype {tokens.dtype}"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
