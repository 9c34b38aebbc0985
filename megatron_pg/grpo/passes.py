"""Forward and backward over microbatches through Megatron's schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from ..data import Microbatch, PackedRow, PrefixRow, TokenValues, Wave
from ..loss import PolicyLossConfig, grpo_loss
from ..mcore import (
    Predictions,
    PrefixGroupedSeqParams,
    ScheduledRow,
    has_router_losses,
    prefix_resident_forward_backward,
)
from .replay import RouteRecord
from .replicas import Ranks

Values = TypeVar("Values", Tensor, Tensor | None)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How trained tokens are predicted.

    Attributes:
        temperature: of the logprobs; the sampling temperature.
        vocab_size: entries of the vocabulary without padding.
        chunk_tokens: predictions whose logits exist at once.
        resident_mode: how gradients of resident prefixes are made.
    """

    temperature: float
    vocab_size: int
    chunk_tokens: int
    resident_mode: Literal["retain", "recompute"] = "retain"


def compute_logprobs(
    chunks: Sequence[Any],
    waves: Sequence[Wave],
    head: HeadConfig,
    ranks: Ranks,
    record: RouteRecord | None = None,
) -> list[Tensor]:
    """Logprobs ``[M]`` of every row's trained tokens, without a graph.

    The same packing, kernels and code as training, so that old and new logprobs agree bit for bit
    before the first update.

    Args:
        chunks: of the model that predicts.
        waves: the rows.
        head: how they are predicted.
        ranks: this rank's place.
        record: keeps what the routers decide.

    Returns:
        One float64 CPU tensor per row on last-stage ranks, nothing on the others.
    """

    def forward_step(rows: Iterator[ScheduledRow], model: Any) -> Any:
        scheduled = next(rows)
        row = scheduled.row
        output = _forward(model, scheduled, head, ranks, with_entropy=False, record=record)
        if isinstance(row, PrefixRow):
            return output, _prefix_loss(ranks)

        def loss_func(output: Any) -> Any:
            logprobs = output[0][_to(row.prediction_ids, ranks.device)]
            nothing = torch.zeros((), device=ranks.device)
            return nothing, _no_tokens(ranks), {"logprobs": logprobs.detach()}

        return output, loss_func

    with torch.no_grad():
        results = _run_schedule(chunks, waves, forward_step, head, forward_only=True)
    # Fetched when all is launched: within the schedule the host would wait for every microbatch.
    return [result["logprobs"].double().cpu() for result in results]


def train_pass(
    chunks: Sequence[Any],
    waves: Sequence[Wave],
    values: TokenValues,
    policy: PolicyLossConfig,
    head: HeadConfig,
    ranks: Ranks,
    *,
    logical_tokens: int,
) -> dict[str, float]:
    """Gradients of the loss over all rows, left in the gradient buffers.

    The weights in ``values`` hold the global denominators, so gradients are summed over rows and
    data-parallel ranks and never averaged. Losses of routers are a mean over the rows of all
    replicas, each weighted by its tokens in written-out samples.

    Args:
        chunks: of the model that is trained.
        waves: the rows of this replica.
        values: what the loss reads.
        policy: the loss.
        head: how tokens are predicted.
        ranks: this rank's place.
        logical_tokens: of the written-out samples of all replicas.

    Returns:
        The loss's metric sums over this rank's rows (see ``loss.metric_means``); empty on
        ranks that do not predict.
    """

    def forward_step(rows: Iterator[ScheduledRow], model: Any) -> Any:
        scheduled = next(rows)
        row = scheduled.row
        output = _forward(model, scheduled, head, ranks, with_entropy=True)
        if isinstance(row, PrefixRow):
            return output, _prefix_loss(ranks)

        def loss_func(output: Any) -> Any:
            loss, sums = microbatch_loss(output, row.with_values(values), policy, ranks.device)
            if not has_losses:
                return loss, _no_tokens(ranks), sums
            # Megatron multiplies the losses of a row's routers by the row's tokens, and divides
            # all gradients by the sum of these counts.
            return loss * logical_tokens, _tokens(_logical_tokens(row), ranks), sums

        return output, loss_func

    has_losses = has_router_losses(get_model_config(chunks[0]))
    for chunk in chunks:
        chunk.zero_grad_buffer()
    results = _run_schedule(chunks, waves, forward_step, head, forward_only=False)
    if not results:
        return {}
    sums = torch.stack([torch.stack(list(result.values())) for result in results]).sum(0)
    return dict(zip(results[0], sums.tolist()))


def microbatch_loss(
    output: tuple[Tensor, Tensor],
    batch: Microbatch,
    policy: PolicyLossConfig,
    device: torch.device,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``grpo_loss`` of a microbatch, without waiting for the device.

    Args:
        output: the last stage's logprobs and entropies ``[E]``.
        batch: whose trained tokens read them.
        policy: the loss.
        device: that ``output`` lives on.
    """
    logprobs, entropy = output
    ids = _to(batch.prediction_ids, device)
    return grpo_loss(
        logprobs[ids],
        entropy[ids] if policy.entropy_coeff else entropy[ids].detach(),
        weights=_to(batch.weights, device),
        advantages=_to(batch.advantages, device),
        sample_ids=_to(batch.sample_ids, device),
        num_samples=len(batch.sample_numbers),
        config=policy,
        old_logprobs=_to(batch.old_logprobs, device),
        ref_logprobs=_to(batch.ref_logprobs, device),
        rollout_logprobs=_to(batch.rollout_logprobs, device),
    )


def _forward(
    model: Any,
    scheduled: ScheduledRow,
    head: HeadConfig,
    ranks: Ranks,
    *,
    with_entropy: bool,
    record: RouteRecord | None = None,
) -> Any:
    row: PackedRow | PrefixRow = scheduled.row
    if isinstance(row, PackedRow):
        predictor_ids, target_tokens = row.predictor_ids, row.target_tokens
    else:
        predictor_ids = target_tokens = torch.empty(0, dtype=torch.int64)
    params = PrefixGroupedSeqParams.from_layout(
        row.layout,
        ranks.device,
        predictions=Predictions(
            predictor_ids=predictor_ids,
            target_tokens=target_tokens,
            temperature=head.temperature,
            vocab_size=head.vocab_size,
            with_entropy=with_entropy,
            chunk_tokens=head.chunk_tokens,
        ),
        prefix_kv=scheduled.prefix_kv,
        resident=scheduled.resident,
        sample_counts=row.sample_counts,
        routed_experts=_to(row.routed_experts, ranks.device),
        record_routes=None if record is None else record.recorder(row),
    )
    tokens = _to(row.tokens, ranks.device)
    return model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


def _prefix_loss(ranks: Ranks) -> Any:
    """Loss function of a row that predicts nothing: a zero with a graph."""
    return lambda output: (output[0].sum(), _no_tokens(ranks), {})


def _run_schedule(
    chunks: Sequence[Any],
    waves: Sequence[Wave],
    forward_step: Any,
    head: HeadConfig,
    forward_only: bool,
) -> list[dict[str, Any]]:
    layouts = [row.layout for wave in waves for row in wave.prefix_rows]
    layouts += [row.layout for wave in waves for row in wave.microbatches]
    results = prefix_resident_forward_backward(
        forward_step_func=forward_step,
        waves=waves,
        model=list(chunks),
        # Only read where stages do not exchange shapes; ours always do.
        seq_length=max(layout.total_tokens for layout in layouts),
        mode=head.resident_mode,
        forward_only=forward_only,
    )
    return [result for result in results if result]


def _logical_tokens(row: PackedRow) -> int:
    """Tokens of the row's written-out samples, resident ones included; a filler has none."""
    if row.is_filler:
        return 0
    forest = row.layout.forest
    resident = 0
    if forest.resident_lens is not None:
        resident = int((forest.resident_lens * forest.segment_multiplicity).sum())
    return row.layout.logical_tokens + resident


def _no_tokens(ranks: Ranks) -> Tensor:
    """Token count 0: Megatron then leaves the gradients as they are."""
    return _tokens(0, ranks)


def _tokens(count: int, ranks: Ranks) -> Tensor:
    return torch.full((), count, dtype=torch.int, device=ranks.device)


def _to(values: Values, device: torch.device) -> Values:
    return None if values is None else values.to(device, non_blocking=True)
