"""What a rollout gives: samples and groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Status = Literal["completed", "truncated", "aborted"]

# Given for every response token, or not at all.
OPTIONAL_TOKEN_VALUES = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages")
# Stands for every expert of a token whose route nobody reported: its router decides by itself.
UNKNOWN_ROUTE = -1
_ROUTE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One prompt and one response with its reward. All tensors live on the CPU.

    An aborted response, and one without tokens, trains nothing: its ``status`` is "aborted", its
    ``loss_mask`` False throughout, whatever was given. A step equals the step of its group without
    it (see ``without_aborted``).

    Attributes:
        prompt_ids: ``[P]`` int64, at least one token.
        response_ids: ``[R]`` int64, R at least 0.
        reward: finite scalar; of an aborted response any, it is not read.
        loss_mask: ``[R]`` bool, True where the response token is trained. Untrained tokens (tool
            output) are real: later tokens attend to them.
        rollout_logprobs: ``[R]`` logprobs that the rollout engine reported.
        old_logprobs: ``[R]`` trainer's logprobs before the update; recomputed when None.
        ref_logprobs: ``[R]`` reference model's logprobs.
        advantages: ``[R]`` when the caller computed them; else from the group's rewards.
        routed_experts: ``[P + R, num_layers, topk]`` int16 (any integers are taken): the experts
            that the rollout engine sent every token to, by layer, to be replayed; -1 throughout for
            a token whose route is not known. One row less, as engines report it, leaves out that
            of the last token. See ``data.RouteShape``.
        status: whether the response ended by itself.
        sample_id: name of the sample in its source, for messages.
        rollout_id: samples of a group with equal ids are turns, sub-agents and compacted contexts
            of one rollout. They share its reward, which is not read where samples carry
            advantages, and the rollout counts once where a group's rewards or an average over
            sequences is taken. None is a rollout of its own. What they share is found in their
            tokens (see ``group_tree``); a ratio or an importance weight of a whole sequence is
            that of one sample.
        loss_weight: how often the sample counts among the sequences of its minibatch, finite and
            above 0, in place of once for each rollout (see ``loss.aggregation_weights``).
            Advantages do not depend on it.
        metadata: carried along, never read by training.

    Raises:
        ValueError: if a tensor has another shape, dtype or device, if the reward is not finite, if
            the loss weight is not above 0, or on an unknown status.
    """

    prompt_ids: Tensor
    response_ids: Tensor
    reward: float
    loss_mask: Tensor
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    routed_experts: Tensor | None = None
    status: Status = "completed"
    sample_id: str | None = None
    rollout_id: str | None = None
    loss_weight: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("prompt_ids", 1), ("response_ids", 0)):
            tokens = getattr(self, name)
            if tokens.dtype != torch.int64 or tokens.ndim != 1 or len(tokens) < least:
                raise ValueError(
                    f"{name} must be a one-dimensional int64 tensor of at least {least} tokens, "
                    f"got shape {tuple(tokens.shape)} and dtype {tokens.dtype}"
                )
        if self.loss_mask.dtype != torch.bool:
            raise ValueError(f"loss_mask must be bool, got {self.loss_mask.dtype}; use mask.bool()")
        for name in ("loss_mask", *OPTIONAL_TOKEN_VALUES):
            values = getattr(self, name)
            if values is not None and values.shape != self.response_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, the response has "
                    f"{len(self.response_ids)} tokens; give one value per response token"
                )
        names = ("prompt_ids", "response_ids", "loss_mask", "routed_experts")
        for name in (*names, *OPTIONAL_TOKEN_VALUES):
            values = getattr(self, name)
            if values is not None and values.device.type != "cpu":
                raise ValueError(f"{name} lives on {values.device}; samples do on the CPU: .cpu()")
        if self.routed_experts is not None:
            object.__setattr__(self, "routed_experts", self._whole_routes(self.routed_experts))
        if not math.isfinite(self.reward):
            raise ValueError(f"reward={self.reward} must be finite; drop or re-score the sample")
        weight = self.loss_weight
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"loss_weight={weight} must be finite and above 0; mask what is not to be trained"
            )
        if self.status not in (known := get_args(Status)):
            raise ValueError(f"status={self.status!r} must be one of {', '.join(known)}")
        if self.status == "aborted" or not len(self.response_ids):
            object.__setattr__(self, "status", "aborted")
            object.__setattr__(self, "loss_mask", torch.zeros_like(self.loss_mask))

    def _whole_routes(self, routes: Tensor) -> Tensor:
        """Int16, with a row for every token."""
        count = len(self.prompt_ids) + len(self.response_ids)
        if routes.ndim != 3 or routes.dtype not in _ROUTE_DTYPES:
            raise ValueError(
                f"routed_experts must be integers [tokens, layers, topk], got shape "
                f"{tuple(routes.shape)} and dtype {routes.dtype}"
            )
        if len(routes) not in (count, count - 1):
            raise ValueError(
                f"routed_experts has {len(routes)} rows, prompt and response have {count} tokens; "
                "give one row per token, or leave out that of the last one"
            )
        if routes.dtype != torch.int16:
            limit = torch.iinfo(torch.int16)
            if routes.numel() and not limit.min <= routes.min() <= routes.max() <= limit.max:
                raise ValueError(
                    f"routed_experts reach from {routes.min()} to {routes.max()}, no model has "
                    "such experts"
                )
            routes = routes.to(torch.int16)
        if len(routes) < count:
            last = routes.new_full((1, *routes.shape[1:]), UNKNOWN_ROUTE)
            routes = torch.cat([routes, last])
        return routes.contiguous()

    @cached_property
    def tokens(self) -> Tensor:
        """``[P + R]`` int64: the written-out sequence."""
        return torch.cat([self.prompt_ids, self.response_ids])

    @cached_property
    def num_loss_tokens(self) -> int:
        """Trained tokens."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one prompt, or of the rollouts that began with it.

    ``group_id`` is authoritative: equal prompts of two groups are never merged. Samples of one
    group may begin with different tokens.
    """

    group_id: str
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> Tensor:
        """``[num_samples]`` float64."""
        return torch.tensor([sample.reward for sample in self.samples], dtype=torch.float64)

    @property
    def rollouts(self) -> Tensor:
        """``[num_samples]`` int64: the rollout of every sample, from 0 in order of appearance."""
        numbers: dict[Any, int] = {}
        keys = [(i,) if s.rollout_id is None else s.rollout_id for i, s in enumerate(self.samples)]
        found = [numbers.setdefault(key, len(numbers)) for key in keys]
        return torch.tensor(found, dtype=torch.int64)


def without_aborted(groups: Iterable[Group]) -> list[Group]:
    """What a step trains: the groups without their aborted samples, if any others are left."""
    kept = []
    for group in groups:
        samples = tuple(sample for sample in group.samples if sample.status != "aborted")
        if samples:
            kept.append(
                group if len(samples) == len(group.samples) else replace(group, samples=samples)
            )
    return kept
