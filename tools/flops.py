"""FLOPs of a pass over one tree, packed and written out: the bound of a step's speed-up."""

from __future__ import annotations

import numpy as np

from megatron_pg import PrefixTree
from megatron_pg.data import FORWARD, FORWARD_BACKWARD, CostModel, FlopWeights
from megatron_pg.tree import pairs_within

__all__ = [
    "FORWARD",
    "FORWARD_BACKWARD",
    "FlopWeights",
    "flops",
    "packed_flops",
    "written_out_flops",
]


def packed_flops(
    tree: PrefixTree, predicted_tokens: float, cost: CostModel, weights: FlopWeights
) -> float:
    """Every shared token once; ``predicted_tokens`` distinct targets reach the output layer."""
    total = flops(tree.unique_tokens, tree.attention_pairs, predicted_tokens, cost, weights)
    return total + _window_flops(tree, cost, weights)


def written_out_flops(
    tree: PrefixTree, predicted_tokens: float, cost: CostModel, weights: FlopWeights
) -> float:
    """Every sample in full; ``predicted_tokens`` are counted once for each sample."""
    pairs, number = tree.logical_attention_pairs, tree.num_samples
    total = flops(tree.logical_tokens, pairs, predicted_tokens, cost, weights)
    alone = PrefixTree(tree.sample_lens, np.full(number, -1), np.arange(number))
    return total + _window_flops(alone, cost, weights)


def _window_flops(tree: PrefixTree, cost: CostModel, weights: FlopWeights) -> float:
    """Of layers with a window."""
    costs = (per_pair * pairs_within(tree, window) for window, per_pair in cost.per_window_pair)
    return weights.per_attention_pair * sum(costs)


def flops(
    tokens: int, pairs: int, predicted_tokens: float, cost: CostModel, weights: FlopWeights
) -> float:
    """Of ``tokens`` through all layers, ``pairs`` in attention, ``predicted_tokens`` at the end.

    ``pairs`` are those of layers without a window.
    """
    return (
        weights.per_token * cost.per_token * tokens
        + weights.per_attention_pair * cost.per_attention_pair * pairs
        + weights.per_loss_token * cost.per_loss_token * predicted_tokens
    )
