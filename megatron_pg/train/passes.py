"""Forward and backward over microbatches through Megatron's schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..data import Microbatch
from ..loss import PolicyLossConfig, grpo_loss
from ..mcore import Predictions, PrefixGroupedSeqParams
from .ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How trained tokens are predicted.

    Attributes:
        temperature: of the logprobs; the sampling temperature.
        vocab_size: entries of the vocabulary without padding.
        chunk_tokens: predictions whose logits exist at once.
    """

    temperature: float
    vocab_size: int
    chunk_tokens: int


def compute_logprobs(
    chunks: Sequence[Any], microbatches: Sequence[Microbatch], head: HeadConfig, ranks: Ranks
) -> list[Tensor]:
    """Logprobs ``[M]`` of every microbatch's trained tokens, without a graph.

    The same packing, kernels and code as training, so that old and new logprobs agree bit for bit
    before the first update.

    Returns:
        One float64 CPU tensor per microbatch on last-stage ranks, nothing on the others.
    """

    def forward_step(batches: Iterator[Microbatch], model: Any) -> Any:
        batch = next(batches)
        output = _forward(model, batch, head, ranks, with_entropy=False)

        def loss_func(output: Any) -> Any:
            logprobs = output[0][batch.edge_ids.to(ranks.device)]
            nothing = torch.zeros((), device=ranks.device)
            return nothing, _no_tokens(ranks), {"logprobs": logprobs.detach().double().cpu()}

        return output, loss_func

    with torch.no_grad():
        results = _run_schedule(chunks, microbatches, forward_step, forward_only=True)
    return [result["logprobs"] for result in results]


def train_pass(
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    policy: PolicyLossConfig,
    head: HeadConfig,
    ranks: Ranks,
) -> dict[str, float]:
    """Gradients of the loss over all microbatches, left in the gradient buffers.

    Weights in the microbatches hold the global denominators, so gradients are summed over
    microbatches and data-parallel ranks and never averaged.

    Returns:
        The loss's metric sums over this rank's microbatches (see ``loss.metric_means``); empty on
        ranks that do not predict.
    """

    def forward_step(batches: Iterator[Microbatch], model: Any) -> Any:
        batch = next(batches)
        output = _forward(model, batch, head, ranks, with_entropy=True)

        def loss_func(output: Any) -> Any:
            edge_ids = batch.edge_ids.to(ranks.device)
            loss, sums = grpo_loss(
                output[0][edge_ids],
                output[1][edge_ids] if policy.entropy_coeff else output[1][edge_ids].detach(),
                weights=batch.weights.to(ranks.device),
                advantages=batch.advantages.to(ranks.device),
                sample_ids=batch.sample_ids.to(ranks.device),
                num_samples=len(batch.sample_numbers),
                config=policy,
                old_logprobs=_to(batch.old_logprobs, ranks),
                ref_logprobs=_to(batch.ref_logprobs, ranks),
                rollout_logprobs=_to(batch.rollout_logprobs, ranks),
            )
            return loss, _no_tokens(ranks), sums

        return output, loss_func

    for chunk in chunks:
        chunk.zero_grad_buffer()
    results = _run_schedule(chunks, microbatches, forward_step, forward_only=False)
    names = results[0] if results else {}
    return {name: float(sum(float(r[name]) for r in results)) for name in names}


def _forward(
    model: Any, batch: Microbatch, head: HeadConfig, ranks: Ranks, with_entropy: bool
) -> Any:
    params = PrefixGroupedSeqParams.from_layout(
        batch.layout,
        ranks.device,
        predictions=Predictions(
            predictor_ids=batch.predictor_ids,
            target_tokens=batch.target_tokens,
            temperature=head.temperature,
            vocab_size=head.vocab_size,
            with_entropy=with_entropy,
            chunk_tokens=head.chunk_tokens,
        ),
    )
    tokens = batch.tokens.to(ranks.device, non_blocking=True)
    return model(tokens[None], params.position_ids[None], None, packed_seq_params=params)


def _run_schedule(
    chunks: Sequence[Any], microbatches: Sequence[Microbatch], forward_step: Any, forward_only: bool
) -> list[dict[str, Any]]:
    iterators = [iter(microbatches) for _ in chunks]
    interleaved = len(chunks) > 1
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(microbatches),
        # Only read where stages do not exchange shapes; ours always do.
        seq_length=max(batch.layout.total_tokens for batch in microbatches),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [result for result in results if result]


def _no_tokens(ranks: Ranks) -> Tensor:
    """Token count 0: Megatron then leaves the gradients as they are."""
    return torch.zeros((), dtype=torch.int, device=ranks.device)


def _to(values: Tensor | None, ranks: Ranks) -> Tensor | None:
    return None if values is None else values.to(ranks.device, non_blocking=True)
