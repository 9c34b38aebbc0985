"""The nouns of a training step: samples, groups and microbatches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..tree import PackedLayout

Status = Literal["completed", "truncated", "aborted"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One prompt and one response with its reward. All tensors live on the CPU.

    Attributes:
        prompt_ids: ``[P]`` int64, at least one token.
        response_ids: ``[R]`` int64, at least one token.
        reward: finite scalar.
        loss_mask: ``[R]`` bool, True where the response token is trained. Untrained tokens (tool
            output) are real: later tokens attend to them.
        rollout_logprobs: ``[R]`` logprobs that the rollout engine reported.
        old_logprobs: ``[R]`` trainer's logprobs before the update; recomputed when None.
        ref_logprobs: ``[R]`` reference model's logprobs.
        advantages: ``[R]`` when the caller computed them; else from the group's rewards.
        status: whether the response ended by itself.
        metadata: carried along, never read by training.
    """

    prompt_ids: Tensor
    response_ids: Tensor
    reward: float
    loss_mask: Tensor
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    status: Status = "completed"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> Tensor:
        """``[P + R]`` int64: the written-out sequence."""
        return torch.cat([self.prompt_ids, self.response_ids])


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one prompt.

    ``group_id`` is authoritative: equal prompts of two groups are never merged.
    """

    group_id: str
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> Tensor:
        """``[num_samples]`` float64."""
        return torch.tensor([sample.reward for sample in self.samples], dtype=torch.float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Microbatch:
    """One packed row and what the loss needs of it, trained tokens flattened sample by sample.

    M is the number of trained (sample, token) pairs of the row, in the order of the row's samples
    and root to leaf within each; E <= M is the number of distinct packed tokens among them (a
    trained token that samples share is predicted once and counted once per sample).

    Attributes:
        tokens: ``[total_tokens]`` int64 row.
        layout: where every token stands.
        sample_numbers: ``[num_samples]`` int64 place of the row's samples in the global batch.
        predictor_ids: ``[E]`` int64 packed index whose hidden state predicts the token.
        target_tokens: ``[E]`` int64 token to be predicted.
        edge_ids: ``[M]`` int64 in [0, E): which prediction a trained token reads.
        sample_ids: ``[M]`` int64 row-local sample of every trained token, ascending.
        weights: ``[M]`` float64 share of the token in the global loss (see ``loss.aggregate``).
        advantages: ``[M]`` float64.
        old_logprobs, ref_logprobs, rollout_logprobs: ``[M]`` float64, or None.
    """

    tokens: Tensor
    layout: PackedLayout
    sample_numbers: Tensor
    predictor_ids: Tensor
    target_tokens: Tensor
    edge_ids: Tensor
    sample_ids: Tensor
    weights: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
