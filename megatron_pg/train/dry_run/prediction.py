"""Seconds of a step on a card, predicted from the rows of the first one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...data import (
    CARDS,
    FORWARD,
    FORWARD_BACKWARD,
    AttentionSizes,
    CostModel,
    FlopWeights,
    LayerKind,
    LinearSizes,
    PackPlan,
    StepTime,
    StepWork,
    predict_step,
)
from ...mcore import layer_windows
from ...parallel import ParallelSizes, exchanged_values
from ..config import AlgorithmConfig, TrainConfig
from ..model import ModelPlan
from .layers import layer_sizes, mixer_sizes


def predict_first_step(
    config: TrainConfig,
    plan: ModelPlan,
    plans: Sequence[Sequence[PackPlan]],
    *,
    sizes: ParallelSizes,
    card: str,
    updated: float,
    num_minibatches: int,
    recorded: Collection[str],
) -> StepTime:
    """Of the slowest data-parallel rank, whatever the machine's own number format in bf16.

    Args:
        config: of the run.
        plan: of its model.
        plans: waves of every data-parallel rank.
        sizes: of the parallel layout.
        card: key of ``CARDS``.
        updated: parameters whose optimizer state one rank holds.
        num_minibatches: that the step trains.
        recorded: values that the rollouts bring.
    """
    model = plan.config
    pattern = plan.hybrid_layer_pattern
    cost = CostModel.from_config(model, plan.vocab_size, layer_windows(model), pattern)
    attention, kinds = AttentionSizes.from_config(model), plan.layer_kinds
    exchanged = sum(_exchanged_values(plan, kind, sizes) for kind in kinds) / len(kinds)
    algorithm = config.algorithm
    return max(
        (
            predict_step(
                StepWork.of_waves(waves, cost, attention),
                CARDS[card],
                cost=cost,
                hidden_size=model.hidden_size,
                vocab_size=plan.vocab_size,
                num_layers=model.num_layers,
                optimizer_parameters=updated,
                passes=_passes(algorithm, recorded, model.recompute_granularity == "full"),
                num_updates=algorithm.ppo_epochs * num_minibatches,
                tp_size=sizes.tp,
                sequence_parallel=sizes.sp,
                pp_size=sizes.pp,
                vpp_size=sizes.vpp or 1,
                cp_size=sizes.cp,
                exchanged_values=exchanged,
                num_attention_layers=sum(kind.attends for kind in kinds),
                num_parts=sum(layer_sizes(plan, kind).num_parts for kind in kinds),
            )
            for waves in plans
        ),
        key=lambda time: time.total,
    )


def _exchanged_values(plan: ModelPlan, kind: LayerKind, sizes: ParallelSizes) -> float:
    """As ``predict_step`` takes them, of one layer."""
    mixer = mixer_sizes(plan.config, kind)
    if mixer is None:
        return 0.0
    if isinstance(mixer, LinearSizes):
        return mixer.exchanged_values(sizes.tp, sizes.cp)
    heads, kv_heads = mixer.num_heads // sizes.tp, max(mixer.num_kv_heads // sizes.tp, 1)
    return exchanged_values(heads, kv_heads, mixer.head_dim + mixer.value_dim, sizes.cp)


def _passes(
    algorithm: AlgorithmConfig, recorded: Collection[str], recomputes_layers: bool
) -> FlopWeights:
    """Training passes of every epoch, and forward ones of the old and the reference policy."""
    needs_ref = algorithm.needs_reference and not algorithm.precompute_ref_logprobs
    forward = (algorithm.runs_old_pass and "old_logprobs" not in recorded) + (
        needs_ref and "ref_logprobs" not in recorded
    )
    epochs, again = algorithm.ppo_epochs, int(recomputes_layers)
    train = FORWARD_BACKWARD
    return FlopWeights(
        epochs * (train.per_token + again) + forward * FORWARD.per_token,
        epochs * (train.per_attention_pair + again) + forward * FORWARD.per_attention_pair,
        epochs * train.per_loss_token + forward * FORWARD.per_loss_token,
    )
