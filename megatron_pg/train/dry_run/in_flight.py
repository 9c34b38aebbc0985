"""What a pipeline rank holds at once: passes in flight, and what a layer of each keeps."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.transformer_config import TransformerConfig

from ...data import MemoryModel


def passes_in_flight(stage: int, pp_size: int, vpp_size: int, num_rows: int | None) -> list[int]:
    """Forward passes whose backward passes have not begun at the fullest time, of every chunk.

    Args:
        stage: of the pipeline, from 0.
        pp_size: stages of it.
        vpp_size: chunks of a stage; 1 without the interleaved schedule.
        num_rows: microbatches of the step; None for enough of them.
    """
    number = pp_size - stage
    if vpp_size > 1:
        # Twice as far ahead, by as many passes more as the chunks before the last one have.
        number = 2 * (pp_size - stage - 1) + (vpp_size - 1) * pp_size + 1
    if num_rows is not None:
        number = min(number, num_rows * vpp_size)
    counts = [0] * vpp_size
    for place in range(number):
        # Runs of as many microbatches as stages go through one chunk after another.
        counts[place // pp_size % vpp_size] += 1
    return counts


def kept_of_chunk(layers: Sequence[MemoryModel], config: TransformerConfig) -> int:
    """Bytes of a token of one pass through the layers of a chunk."""
    if config.recompute_granularity != "full":
        return sum(layer.activations for layer in layers)
    number = config.recompute_num_layers or 1
    if config.recompute_method == "block":
        again, others = layers[:number], layers[number:]
        kept = sum(layer.kept_without_recompute for layer in others)
        return kept + sum(layer.activations for layer in again)
    return sum(layer.activations for layer in layers[::number])


def states_of_chunk(layers: Sequence[MemoryModel], config: TransformerConfig) -> int:
    """Bytes of states that one segment begins from in the layers of a chunk."""
    if config.recompute_granularity == "full":
        return 0
    return sum(layer.state for layer in layers)


def held_by_backward(layers: Sequence[MemoryModel], config: TransformerConfig) -> int:
    """Bytes of a token that the backward pass makes in the widest layers of a chunk.

    What it runs once more there, and gradients.
    """
    number = 1
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        number = config.recompute_num_layers or 1
    runs = [layers[start : start + number] for start in range(0, len(layers), number)]
    return max(
        sum(layer.recomputed for layer in run) + max(layer.gradients for layer in run)
        for run in runs
    )
