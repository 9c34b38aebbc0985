"""FLOPs of a pass over one tree, packed and written out: the bound of a step's speed-up."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pg import PrefixTree
from megatron_pg.data import CostModel


@dataclass(frozen=True)
class FlopWeights:
    """FLOPs of a pass relative to the forward FLOPs of ``CostModel``."""

    per_token: float
    per_attention_pair: float
    per_loss_token: float


FORWARD = FlopWeights(1, 1, 1)
# The backward of a matrix product costs twice its forward; that of attention 2.5 times, since
# scores are computed anew; that of the chunked output layer 3 times, since logits are.
FORWARD_BACKWARD = FlopWeights(3, 3.5, 4)


def packed_flops(
    tree: PrefixTree, predicted_tokens: float, cost: CostModel, weights: FlopWeights
) -> float:
    """Every shared token once; ``predicted_tokens`` distinct targets reach the output layer."""
    return flops(tree.unique_tokens, tree.attention_pairs, predicted_tokens, cost, weights)


def written_out_flops(
    tree: PrefixTree, predicted_tokens: float, cost: CostModel, weights: FlopWeights
) -> float:
    """Every sample in full; ``predicted_tokens`` are counted once for each sample."""
    return flops(tree.logical_tokens, tree.logical_attention_pairs, predicted_tokens, cost, weights)


def flops(
    tokens: int, pairs: int, predicted_tokens: float, cost: CostModel, weights: FlopWeights
) -> float:
    """Of ``tokens`` through all layers, ``pairs`` in attention, ``predicted_tokens`` at the end."""
    return (
        weights.per_token * cost.per_token * tokens
        + weights.per_attention_pair * cost.per_attention_pair * pairs
        + weights.per_loss_token * cost.per_loss_token * predicted_tokens
    )
