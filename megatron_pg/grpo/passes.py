"""Forward and backward over microbatches through Megatron's schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from ..data import Microbatch, PackedRow, PrefixRow, ResidentMode, TokenValues, Wave
from ..loss import PolicyLossConfig, grpo_loss
from ..mcore import (
    PrefixGroupedSeqParams,
    ScheduledRow,
    has_router_losses,
    prefix_resident_forward_backward,
    undivided_router_losses,
)
from .replay import RouteRecord
from .replicas import Ranks
from .staging import StagedRow, stage_row


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How trained tokens are predicted.

    Attributes:
        temperature: of the logprobs; the sampling temperature.
        vocab_size: entries of the vocabulary without padding.
        chunk_tokens: predictions whose logits exist at once; None for ``loss``'s choice.
        with_entropy: whether training passes make the entropy of every prediction.
        resident_mode: how gradients of resident prefixes are made.
    """

    temperature: float
    vocab_size: int
    chunk_tokens: int | None
    with_entropy: bool = True
    resident_mode: ResidentMode = "retain"


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
        staged = stage_row(scheduled.row, model, ranks)
        output = _forward(model, scheduled, staged, head, with_entropy=False, record=record)
        if isinstance(staged.host, PrefixRow):
            return output, _prefix_loss(ranks)

        def loss_func(output: Any) -> Any:
            logprobs = output[0][staged.row.prediction_ids]
            nothing = torch.zeros((), device=ranks.device)
            return nothing, _no_tokens(ranks), {"logprobs": logprobs.detach()}

        return output, loss_func

    with torch.no_grad():
        results = _run_schedule(chunks, waves, forward_step, head, forward_only=True)
    if not results:
        return []
    # Fetched at once, when all is launched: the host waits for the device once.
    found = [result["logprobs"] for result in results]
    return list(torch.cat(found).double().cpu().split([len(of_row) for of_row in found]))


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
    replicas, each weighted by its tokens in written-out samples, for any parallel layout.

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
        staged = stage_row(row, model, ranks, values)
        output = _forward(model, scheduled, staged, head, with_entropy=head.with_entropy)
        if isinstance(row, PrefixRow):
            return output, _prefix_loss(ranks)

        def loss_func(output: Any) -> Any:
            loss, sums = microbatch_loss(output, staged.row, policy)
            if not has_losses:
                return loss, _no_tokens(ranks), sums
            # Megatron multiplies the losses of a row's routers by the row's tokens, and divides
            # all gradients by the sum of these counts.
            whole = loss * (logical_tokens * share)
            # Added up over context-parallel ranks, which all have the whole row's.
            own_tokens = 0 if ranks.cp_rank else _logical_tokens(row)
            return whole, _tokens(own_tokens, ranks), sums

        return output, loss_func

    config = get_model_config(chunks[0])
    has_losses = has_router_losses(config)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    with undivided_router_losses(config) as share:
        results = _run_schedule(chunks, waves, forward_step, head, forward_only=False)
    if not results:
        return {}
    sums = torch.stack([torch.stack(list(result.values())) for result in results]).sum(0)
    return dict(zip(results[0], sums.tolist()))


def microbatch_loss(
    output: tuple[Tensor, Tensor | None], batch: Microbatch, policy: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """``grpo_loss`` of a microbatch, without waiting for the device.

    Args:
        output: the last stage's logprobs ``[E]``, and its entropies or None.
        batch: whose trained tokens read them, its values on the device of ``output``.
        policy: the loss.
    """
    logprobs, entropy = output
    ids = batch.prediction_ids
    if entropy is not None:
        entropy = entropy[ids] if policy.entropy_coeff else entropy[ids].detach()
    return grpo_loss(
        logprobs[ids],
        entropy,
        weights=batch.weights,
        advantages=batch.advantages,
        sample_ids=batch.sample_ids,
        num_samples=len(batch.sample_numbers),
        config=policy,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
    )


def _forward(
    model: Any,
    scheduled: ScheduledRow,
    staged: StagedRow,
    head: HeadConfig,
    *,
    with_entropy: bool,
    record: RouteRecord | None = None,
) -> Any:
    row, predictions = staged.host, staged.predictions
    if predictions is not None:
        predictions = replace(
            predictions,
            temperature=head.temperature,
            vocab_size=head.vocab_size,
            with_entropy=with_entropy,
            chunk_tokens=head.chunk_tokens,
        )
    tokens = staged.row.tokens
    params = PrefixGroupedSeqParams.from_layout(
        row.layout,
        tokens.device,
        predictions=predictions,
        prefix_kv=scheduled.prefix_kv,
        resident=scheduled.resident,
        sample_counts=row.sample_counts,
        routed_experts=staged.row.routed_experts,
        record_routes=None if record is None else record.recorder(scheduled.row),
    )
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
        # Not read: every stage knows the length of every row.
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
