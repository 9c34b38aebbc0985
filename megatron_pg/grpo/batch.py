"""A step's groups as one replica holds them: rows of indices, and one flat array per value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import PackedRow, TokenValues, Wave, make_wave, token_values
from .advantages import sample_weights
from .packing import plan_rows_of_replica
from .packing_config import PackingConfig
from .placement import Placement
from .replicas import Replicas
from .settings import GrpoConfig
from .shape import StepShape
from .token_counts import TokenCounts


@dataclass(frozen=True, eq=False, kw_only=True)
class Minibatch:
    """One optimizer step's rows.

    Attributes:
        waves: this replica's rows.
        tokens: over the rows of all replicas.
        predicted_cost: see ``PlannedRows``.
        predicted_cost_repeated: see ``PlannedRows``.
    """

    waves: tuple[Wave, ...]
    tokens: TokenCounts
    predicted_cost: float
    predicted_cost_repeated: float | None

    @property
    def rows(self) -> tuple[PackedRow, ...]:
        """The rows that train, wave by wave."""
        return tuple(row for wave in self.waves for row in wave.microbatches)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepBatch:
    """The groups of a step that this replica packs.

    N trained (sample, token) pairs of S samples stand one after another, and every value that the
    loss reads of them is one array ``[N]``; a row holds places in these arrays, so values do not
    depend on the rows that they were computed in.

    Attributes:
        rollout: numbers of all groups that were brought, on every rank.
        shape: of the judged ones among them, N_all samples.
        sample_numbers: ``[S]`` place of this replica's samples in ``shape``.
        counts: ``[S]`` trained tokens of each; they add up to N.
        values: what the loss reads.
        minibatches: one for each optimizer step of a pass.
        left_out: rows of the judged groups that no minibatch trains; None when there are none.
        num_skipped: groups left out for their rewards, or because nothing can be whitened.
        kl_of_samples: ``[N_all]`` KL taken off the rewards, on every rank; None when none is.
    """

    rollout: StepShape
    shape: StepShape
    sample_numbers: Tensor
    counts: Tensor
    values: TokenValues
    minibatches: tuple[Minibatch, ...]
    left_out: Minibatch | None
    num_skipped: int
    kl_of_samples: Tensor | None = None

    @property
    def tokens(self) -> TokenCounts:
        """Over the rows of all minibatches and replicas."""
        return sum((minibatch.tokens for minibatch in self.minibatches), TokenCounts())

    @property
    def num_tokens(self) -> int:
        """N, trained (sample, token) pairs of this replica."""
        return len(self.values.weights)

    @property
    def sample_ids(self) -> Tensor:
        """``[N]`` sample of every trained pair, in [0, S)."""
        return torch.repeat_interleave(self.counts)

    def parts(self, *, with_left_out: bool) -> list[Minibatch]:
        """The minibatches, and what they leave out if asked for."""
        left_out = [self.left_out] if with_left_out and self.left_out is not None else []
        return [*self.minibatches, *left_out]

    def collect(self, rows: Sequence[PackedRow], values: Sequence[Tensor]) -> Tensor:
        """``[N]`` float64 from values ``[M]`` of every row; 0 where no row stands."""
        flat = torch.zeros(self.num_tokens, dtype=torch.float64)
        for row, own in zip(rows, values, strict=True):
            flat[row.token_numbers] = own.double()
        return flat


def pack_batch(
    placement: Placement, algorithm: GrpoConfig, packing: PackingConfig, replicas: Replicas
) -> StepBatch:
    """Rows and values of the groups that were placed here; a collective.

    Args:
        placement: of ``place_groups``.
        algorithm: decides the weight of every token.
        packing: decides the rows.
        replicas: of the model.

    Raises:
        ValueError: on every rank, if a group fits in no way.
    """
    shape = placement.shape
    members = list(placement.groups)
    planned = plan_rows_of_replica(placement.shapes, placement.parts, packing, replicas)
    groups = dict(enumerate(placement.groups.values()))
    weights = torch.zeros(len(shape.rewards), dtype=torch.float64)
    for chosen in placement.minibatches:
        of_minibatch = sample_weights(shape.take(chosen), algorithm)
        weights[shape.samples_of(chosen)] = of_minibatch
    numbers = torch.from_numpy(shape.samples_of(members))
    values = token_values(
        placement.shapes,
        groups,
        sample_weights=weights[numbers],
        # A replica without trained tokens runs the same loss as the others.
        carried=shape.carried or (),
    )
    minibatches = [
        Minibatch(
            waves=tuple(make_wave(wave, groups) for wave in rows.waves),
            tokens=rows.tokens,
            predicted_cost=rows.predicted_cost,
            predicted_cost_repeated=rows.predicted_cost_repeated,
        )
        for rows in planned
    ]
    return StepBatch(
        rollout=placement.rollout,
        shape=shape,
        sample_numbers=numbers,
        counts=torch.from_numpy(shape.loss_lens)[numbers],
        values=values,
        minibatches=tuple(minibatches[: len(placement.minibatches)]),
        left_out=minibatches[-1] if placement.left_out else None,
        num_skipped=placement.num_skipped,
    )
