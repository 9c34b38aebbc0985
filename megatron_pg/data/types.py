"""The nouns of a training step: samples, groups, packed rows and the values of their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..tree import PackedLayout

Status = Literal["completed", "truncated", "aborted"]

# Given for every response token, or not at all.
OPTIONAL_TOKEN_VALUES = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages")


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
        status: whether the response ended by itself.
        sample_id: name of the sample in its source, for messages.
        rollout_id: samples of a group with equal ids are turns, sub-agents and compacted contexts
            of one rollout. They share its reward, and the rollout counts once where a group's
            rewards or an average over sequences is taken. None is a rollout of its own. What they
            share is found in their tokens (see ``group_tree``); a ratio or an importance weight of
            a whole sequence is that of one sample.
        loss_weight: how often the sample counts among the sequences of its minibatch, finite and
            above 0, in place of once for each rollout (see ``loss.aggregation_weights``).
            Advantages do not depend on it.
        metadata: carried along, never read by training.

    Raises:
        ValueError: if a tensor has another shape, dtype or device, if the reward is not finite, or
            if the loss weight is not above 0.
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
        for name in ("prompt_ids", "response_ids", "loss_mask", *OPTIONAL_TOKEN_VALUES):
            values = getattr(self, name)
            if values is not None and values.device.type != "cpu":
                raise ValueError(f"{name} lives on {values.device}; samples do on the CPU: .cpu()")
        if not math.isfinite(self.reward):
            raise ValueError(f"reward={self.reward} must be finite; drop or re-score the sample")
        weight = self.loss_weight
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"loss_weight={weight} must be finite and above 0; mask what is not to be trained"
            )
        if self.status == "aborted" or not len(self.response_ids):
            object.__setattr__(self, "status", "aborted")
            object.__setattr__(self, "loss_mask", torch.zeros_like(self.loss_mask))

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
        keys = [i if s.rollout_id is None else s.rollout_id for i, s in enumerate(self.samples)]
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


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenValues:
    """What the loss reads of N trained (sample, token) pairs: one flat float64 CPU array each.

    The pairs stand sample by sample, in the order of the groups that they were taken from, and root
    to leaf within each sample.

    Attributes:
        weights: ``[N]`` share of the token in the global loss (see ``loss.aggregate``).
        advantages: ``[N]``; None as long as they are not known.
        old_logprobs, ref_logprobs, rollout_logprobs: ``[N]``, or None.

    Raises:
        ValueError: if an array has another number of entries.
    """

    weights: Tensor
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in OPTIONAL_TOKEN_VALUES:
            values = getattr(self, name)
            if values is not None and values.shape != self.weights.shape:
                raise ValueError(
                    f"{name} has shape {tuple(values.shape)}, but {len(self.weights)} (sample, "
                    "token) pairs are trained; give one entry per pair"
                )


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedRow:
    """One packed row, and which of its tokens are trained.

    M is the number of trained (sample, token) pairs of the row, in the order of the row's samples
    and root to leaf within each; E <= M is the number of distinct packed tokens among them (a
    trained token that samples share is predicted once and counted once per sample). M is 0 when no
    token of the row is trained, as in a filler.

    Attributes:
        tokens: ``[total_tokens]`` int64 row.
        layout: where every token stands.
        sample_numbers: ``[num_samples]`` int64 place of the row's samples in the planned batch; -1
            for the one sample of a filler, which belongs to no group.
        predictor_ids: ``[E]`` int64 packed index whose hidden state predicts the token.
        target_ids: ``[E]`` int64 packed index of the token to be predicted.
        prediction_ids: ``[M]`` int64 in [0, E): which prediction a trained token reads.
        sample_ids: ``[M]`` int64 row-local sample of every trained token, ascending.
        token_numbers: ``[M]`` int64 place of the pair among those of the planned batch, which is
            its entry in ``TokenValues``.
    """

    tokens: Tensor
    layout: PackedLayout
    sample_numbers: Tensor
    predictor_ids: Tensor
    target_ids: Tensor
    prediction_ids: Tensor
    sample_ids: Tensor
    token_numbers: Tensor

    @property
    def target_tokens(self) -> Tensor:
        """``[E]`` int64 tokens to be predicted."""
        return self.tokens[self.target_ids]

    @property
    def num_loss_tokens(self) -> int:
        """M, trained (sample, token) pairs."""
        return len(self.prediction_ids)

    @property
    def is_filler(self) -> bool:
        """Whether the row only keeps data-parallel ranks in step and contributes nothing."""
        return bool((self.sample_numbers < 0).all())

    @cached_property
    def positions(self) -> Tensor:
        """``[M]`` int64: place of every trained token in its written-out sample."""
        return self.layout.position_ids[self.predictor_ids][self.prediction_ids] + 1

    def split_by_sample(self, values: Tensor) -> tuple[Tensor, ...]:
        """``values`` ``[M, ...]`` as one tensor per sample of the row, in ``sample_numbers`` order.

        Entry j of sample i belongs to token ``split_by_sample(positions)[i][j]`` of the written-out
        sample. A sample without trained tokens gets an empty tensor.

        Raises:
            ValueError: if ``values`` has another number of rows than M.
        """
        if values.shape[:1] != (self.num_loss_tokens,):
            raise ValueError(
                f"values has shape {tuple(values.shape)}, its first dim must be "
                f"{self.num_loss_tokens}, one entry per trained (sample, token) pair"
            )
        counts = torch.bincount(self.sample_ids, minlength=len(self.sample_numbers))
        return torch.split(values, counts.tolist())

    def with_values(self, values: TokenValues) -> Microbatch:
        """The row with its share of ``values``.

        Raises:
            ValueError: if there are no advantages yet.
        """
        if values.advantages is None:
            raise ValueError("the values hold no advantages; a loss needs one per trained token")
        own = {f.name: getattr(self, f.name) for f in fields(PackedRow)}
        for f in fields(TokenValues):
            array = getattr(values, f.name)
            own[f.name] = None if array is None else array[self.token_numbers]
        return Microbatch(**own)


@dataclass(frozen=True, eq=False, kw_only=True)
class Microbatch(PackedRow):
    """A packed row with what the loss reads of its M trained (sample, token) pairs.

    Attributes:
        weights: ``[M]`` float64 share of the token in the global loss (see ``loss.aggregate``).
        advantages: ``[M]`` float64.
        old_logprobs, ref_logprobs, rollout_logprobs: ``[M]`` float64, or None.
    """

    weights: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PrefixRow:
    """A row of shared prefixes that stays resident while microbatches attend to it.

    Nothing in it is trained or predicted; its gradient comes from the keys and values that the
    microbatches saw.

    Attributes:
        tokens: ``[total_tokens]`` int64 row.
        layout: where every token stands.
    """

    tokens: Tensor
    layout: PackedLayout


@dataclass(frozen=True, eq=False)
class Wave:
    """What runs together: prefix rows, and the rows that may attend to them.

    Attributes:
        prefix_rows: resident at once; none where every group stands whole in its rows.
        microbatches: ``layout.resident_spans`` of each name the prefix rows by index.
    """

    prefix_rows: tuple[PrefixRow, ...]
    microbatches: tuple[PackedRow, ...]
