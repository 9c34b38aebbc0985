"""What a forward pass gets: packed rows, and the values of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ..tree import PackedLayout
from .types import OPTIONAL_TOKEN_VALUES


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
        routed_experts: ``[total_tokens, num_layers, topk]`` int16 routes to be replayed, -1 where
            the router decides; None where it does throughout.
    """

    tokens: Tensor
    layout: PackedLayout
    sample_numbers: Tensor
    predictor_ids: Tensor
    target_ids: Tensor
    prediction_ids: Tensor
    sample_ids: Tensor
    token_numbers: Tensor
    routed_experts: Tensor | None = None

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

    @property
    def sample_counts(self) -> tuple[int, ...] | None:
        """Samples of the batch that each of the row's stands for; None: one each."""
        return (0,) if self.is_filler else None

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
        sample_counts: samples of the batch that continue each of the prefixes; 0 in a filler.
        routed_experts: as ``PackedRow`` has them.
    """

    tokens: Tensor
    layout: PackedLayout
    sample_counts: tuple[int, ...] | None = None
    routed_experts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Wave:
    """What runs together: prefix rows, and the rows that may attend to them.

    Attributes:
        prefix_rows: resident at once; none where every group stands whole in its rows.
        microbatches: ``layout.resident_spans`` of each name the prefix rows by index.
    """

    prefix_rows: tuple[PrefixRow, ...]
    microbatches: tuple[PackedRow, ...]
