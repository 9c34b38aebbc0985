"""What a step takes on a card at the least: counts over rates, a prediction and no measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from ..tree import PrefixTree
from .cost import FORWARD_BACKWARD, CostModel, FlopWeights
from .model import AttentionSizes
from .planning import PackPlan, RowPart, part_shape, part_tree

# Values are of 16 bits; what is summed, of 32.
_VALUE, _SUM = 2, 4
# Of the seven passes over a chunk's logits, those that are no product's: statistics read them, the
# gradient is read and written in place.
_LOGITS_PASSES = 3
# Adam on fp32 weights: gradients are read twice and set to zero, weights and two moments are read
# and written, weights are written once more in 16 bits.
_OPTIMIZER_BYTES = 2 * _SUM + _SUM + 3 * 2 * _SUM + _VALUE


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What an accelerator reaches in large operations.

    Attributes:
        product_flops: of bf16 matrix products, a second.
        attention_flops: of a forward and backward pass of bf16 attention, a second.
        memory_bytes: read and written by a copy, a second.
        link_bytes: sent to other cards of a host, a second.
        sold_gb: memory by its name.
        capacity_bytes: of it, what PyTorch finds there.
    """

    product_flops: float
    attention_flops: float
    memory_bytes: float
    link_bytes: float
    sold_gb: int
    capacity_bytes: int


CARDS = {
    # Data sheet of the H100 SXM: 989 TFLOP/s, 3.35 TB/s, 450 GB/s a direction. Measured on such
    # cards: a product of 790 TFLOP/s, a copy of 3.0 TB/s; attention as on the H200, whose
    # processor is the same; four fifths of the link, as in collectives of large messages.
    "h100": Card(
        product_flops=790e12,
        attention_flops=255e12,
        memory_bytes=3.0e12,
        link_bytes=360e9,
        sold_gb=80,
        capacity_bytes=int(79.1 * 2**30),
    ),
    # Data sheet: 4.8 TB/s, else as above. Measured: a copy of 4.3 TB/s; FlashAttention-2 forward
    # and backward over a prompt of 4096 and 16 responses of 512 tokens, 32/8 heads of 128.
    "h200": Card(
        product_flops=790e12,
        attention_flops=255e12,
        memory_bytes=4.3e12,
        link_bytes=360e9,
        sold_gb=141,
        capacity_bytes=int(139.7 * 2**30),
    ),
    # Data sheet of the A100 SXM 80 GB: 312 TFLOP/s, 2.04 TB/s, 300 GB/s a direction, at the shares
    # that the H100 reaches of its own. Attention: the FlashAttention-2 paper's for causal
    # sequences of 2k to 4k tokens, forward and backward.
    "a100": Card(
        product_flops=250e12,
        attention_flops=180e12,
        memory_bytes=1.83e12,
        link_bytes=240e9,
        sold_gb=80,
        capacity_bytes=int(79.1 * 2**30),
    ),
}


def card_here() -> str | None:
    """Key of ``CARDS`` of the device here, if there is one of them."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((card for card in CARDS if card in name), None)


def card_or_here(card: str | None) -> str:
    """This card, or the device here where none is named; an H100 where that is none of ``CARDS``.

    What is balanced by it is balanced for every card with nearly its share of attention to
    products.
    """
    return card or card_here() or "h100"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What one data-parallel rank computes of a step, over the whole model.

    Attributes:
        tokens: that rows hold.
        attention_flops: forward, of the visible pairs in all layers.
        predictions: logits' rows.
        merge_bytes: beside attention's kernels, in one layer, forward and backward.
        num_rows: all rows, prefix rows and fillers too.
        num_waves: that they run in.
    """

    tokens: int
    attention_flops: float
    predictions: float
    merge_bytes: int
    num_rows: int
    num_waves: int

    @classmethod
    def of_waves(
        cls,
        waves: Sequence[PackPlan],
        cost: CostModel,
        attention: AttentionSizes,
        predictions: Callable[[RowPart], float] | None = None,
    ) -> StepWork:
        """Of packed rows.

        Args:
            waves: of the rank.
            cost: of the model, in forward FLOPs.
            attention: of its layers.
            predictions: of a part; None takes every trained token of its samples for one.
        """
        trees: list[PrefixTree] = []
        count = 0.0
        for wave in waves:
            for part in (part for row in wave.rows for part in row):
                trees.append(part_tree(wave.shapes, part))
                lens = part_shape(wave.shapes, part).loss_lens
                count += predictions(part) if predictions else int(lens[list(part.samples)].sum())
            trees += [wave.shapes[i].prefixes for row in wave.prefix_rows for i in row]
        return cls(
            tokens=sum(tree.unique_tokens for tree in trees),
            attention_flops=sum(cost.attention(tree) for tree in trees),
            predictions=count,
            merge_bytes=sum(merge_bytes(tree, attention) for tree in trees),
            num_rows=sum(len(wave.rows) + len(wave.prefix_rows) for wave in waves),
            num_waves=len(waves),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step, by what takes them.

    Left out are norms, rotary embeddings and activations, what the host takes to launch kernels,
    the exchange between data-parallel ranks and between experts, and rollouts. On an H200, 1.2
    billion parameters in Megatron's local layers (16 layers, hidden 2048, vocabulary 128256) took
    167, 218 and 303 ms for rows of 2048 + 8 x 512, 1024 + 8 x 1024 and 4096 + 16 x 512 tokens, of
    which 78, 116 and 194 are said here.
    """

    products: float
    attention: float
    merges: float
    head: float
    exchange: float
    optimizer: float
    idle: float

    @property
    def total(self) -> float:
        """All of them, one after another."""
        return sum(self._parts().values())

    def __str__(self) -> str:
        """Total, and what of it is above a hundredth, largest first."""
        parts = sorted(self._parts().items(), key=lambda part: -part[1])
        named = [f"{name} {value:.2g}" for name, value in parts if value > self.total / 100]
        return f"{self.total:.3g} s ({', '.join(named)})"

    def _parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def seconds_on(card: Card, cost: CostModel, passes: FlopWeights) -> CostModel:
    """The same model in seconds of ``passes`` on a card, instead of forward FLOPs.

    Attention reaches a part of what products reach, so that two rows of equal FLOPs may take times
    that differ.
    """
    product = passes.per_token / card.product_flops
    pair = passes.per_attention_pair / card.attention_flops
    return CostModel(
        per_token=product * cost.per_token,
        per_attention_pair=pair * cost.per_attention_pair,
        per_loss_token=passes.per_loss_token / card.product_flops * cost.per_loss_token,
        per_window_pair=tuple((window, pair * each) for window, each in cost.per_window_pair),
    )


def product_flops_on(card: Card, cost: CostModel) -> CostModel:
    """The same model in forward FLOPs of products that take as long on a card in training.

    What balances ranks and rows: attention's FLOPs count as often as they are slower.
    """
    per_second = card.product_flops / FORWARD_BACKWARD.per_token
    passes = (per_second * weight for weight in vars(FORWARD_BACKWARD).values())
    return seconds_on(card, cost, FlopWeights(*passes))


def merge_bytes(tree: PrefixTree, attention: AttentionSizes) -> int:
    """Bytes that merging the passes of a tree moves in one layer, forward and backward.

    A token at depth k has its own pass and k more over its ancestors, one more over what is
    resident: rows of out and of dq are read for each pass, and written once; log-sum-exps alike, in
    fp32. Keys and values that a later pass reads have two gradients, which are added.
    """
    lens, parents = tree.segment_lens, tree.segment_parents
    depths = tree.segment_depths + (tree.resident_lens is not None)
    moves = int((lens * (depths + 2))[depths > 0].sum())
    queries = moves * attention.num_heads
    keys = 3 * int(lens[np.unique(parents[parents >= 0])].sum()) * attention.num_kv_heads
    width = attention.head_dim + attention.value_dim
    return width * _VALUE * (queries + keys) + _SUM * queries


def predict_step(
    work: StepWork,
    card: Card,
    *,
    cost: CostModel,
    hidden_size: int,
    vocab_size: int,
    num_layers: int,
    optimizer_parameters: float,
    passes: FlopWeights,
    num_updates: int = 1,
    tp_size: int = 1,
    sequence_parallel: bool = False,
    pp_size: int = 1,
    vpp_size: int = 1,
    cp_size: int = 1,
    exchanged_values: float = 0.0,
    num_attention_layers: int | None = None,
    num_parts: int | None = None,
) -> StepTime:
    """Seconds of a step of one data-parallel rank in bf16.

    Args:
        work: of one pass over the step.
        card: of every rank.
        cost: of the model, in forward FLOPs.
        hidden_size: of the model.
        vocab_size: of the model.
        num_layers: of the model.
        optimizer_parameters: that one rank updates.
        passes: over the step's rows, in forward passes.
        num_updates: of the optimizer.
        tp_size: ranks that divide heads and widths.
        sequence_parallel: whether they divide the tokens between layers.
        pp_size: stages of the pipeline.
        vpp_size: chunks of a stage.
        cp_size: ranks that divide the tokens of a row, and the heads of its attention.
        exchanged_values: numbers that one of them sends for each token of a row in one layer's
            forward pass, and again in its backward pass; the mean of all layers.
        num_attention_layers: that have keys and values, whose passes are merged; None: all.
        num_parts: mixers and MLPs of all layers; None: two a layer.
    """
    ranks = tp_size * pp_size * cp_size
    products = passes.per_token * cost.per_token * work.tokens / card.product_flops / ranks
    pairs = passes.per_attention_pair * work.attention_flops / card.attention_flops / ranks
    # A forward pass merges half of what both merge.
    trained = passes.per_token / 3
    merged = num_layers if num_attention_layers is None else num_attention_layers
    merges = trained * work.merge_bytes * merged / card.memory_bytes / ranks
    logits = _LOGITS_PASSES * work.predictions * vocab_size * _VALUE
    head = passes.per_loss_token * cost.per_loss_token * work.predictions / card.product_flops
    head = (head + trained * logits / card.memory_bytes) / (tp_size * cp_size)
    # Rows are gathered before, and summed after, each part; backward they are gathered once more
    # for the weights' gradients where ranks divide them.
    exchanges = (5 if sequence_parallel else 4) * (
        2 * num_layers if num_parts is None else num_parts
    )
    sent = exchanges * hidden_size * (tp_size - 1) / tp_size / cp_size
    sent += 2 * exchanged_values * num_layers
    exchange = trained * work.tokens * sent * _VALUE / card.link_bytes / pp_size
    layers = products + pairs + merges + exchange
    # Each wave fills and drains the pipeline with its rows.
    fill = (pp_size - 1) / vpp_size * work.num_waves
    return StepTime(
        products=products,
        attention=pairs,
        merges=merges,
        head=head,
        exchange=exchange,
        optimizer=num_updates * optimizer_parameters * _OPTIMIZER_BYTES / card.memory_bytes,
        idle=fill * layers / max(work.num_rows, 1),
    )
