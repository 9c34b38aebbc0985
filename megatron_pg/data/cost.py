"""What a row costs: tokens, attention pairs and loss tokens on one scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..tree import BoolArray, PrefixTree, pairs_within
from .model import AttentionSizes, LinearSizes, active_ffn_hidden_size, layer_kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Cost that is linear in unique tokens, attention pairs and loss tokens.

    Only ratios of costs matter, so the unit is free: ``from_model_dims`` counts FLOPs of a forward
    pass (the backward pass scales all three alike). The default has the ratios of a decoder with
    1.5 billion parameters (hidden 1536, 28 layers, vocabulary 151936), in units of one token.

    Attributes:
        per_token: linear layers of all decoder layers, per unique token.
        per_attention_pair: scores and their product with the values, per visible (q, kv) pair, in
            all layers that see every key before a token.
        per_loss_token: output layer, per trained token.
        per_window_pair: windows and the same of all layers that have them.

    Raises:
        ValueError: if a cost is negative or not finite.
    """

    per_token: float = 1.0
    per_attention_pair: float = 6.6e-5
    per_loss_token: float = 0.18
    per_window_pair: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        names = ("per_token", "per_attention_pair", "per_loss_token")
        costs = {name: getattr(self, name) for name in names}
        costs |= {f"per_window_pair[{window}]": cost for window, cost in self.per_window_pair}
        for name, value in costs.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative")

    @classmethod
    def from_model_dims(
        cls,
        *,
        hidden_size: int,
        num_layers: int,
        ffn_hidden_size: int,
        vocab_size: int,
        num_attention_heads: int,
        num_query_groups: int | None = None,
        kv_channels: int | None = None,
        gated_linear_unit: bool = True,
    ) -> CostModel:
        """Forward FLOPs of a dense decoder; two per multiply-add.

        Args:
            hidden_size: width of the residual stream.
            num_layers: decoder layers.
            ffn_hidden_size: width inside the MLP.
            vocab_size: rows of the output layer.
            num_attention_heads: query heads.
            num_query_groups: key and value heads; ``num_attention_heads`` when None.
            kv_channels: width of a head; ``hidden_size // num_attention_heads`` when None.
            gated_linear_unit: whether the MLP has a gate (three matrices instead of two).

        Raises:
            ValueError: if a size is below 1.
        """
        num_query_groups = num_attention_heads if num_query_groups is None else num_query_groups
        if kv_channels is None:
            kv_channels = hidden_size // max(num_attention_heads, 1)
        sizes = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "ffn_hidden_size": ffn_hidden_size,
            "vocab_size": vocab_size,
            "num_attention_heads": num_attention_heads,
            "num_query_groups": num_query_groups,
            "kv_channels": kv_channels,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        attention = AttentionSizes(
            num_heads=num_attention_heads,
            num_kv_heads=num_query_groups,
            head_dim=kv_channels,
            value_dim=kv_channels,
        )
        mlp = (3 if gated_linear_unit else 2) * hidden_size * ffn_hidden_size
        return cls.from_attention(attention, num_layers, hidden_size, num_layers * mlp, vocab_size)

    @classmethod
    def from_attention(
        cls,
        attention: AttentionSizes,
        num_layers: int,
        hidden_size: int,
        mlp_parameters: int,
        vocab_size: int,
    ) -> CostModel:
        """Forward FLOPs of layers with such attention; two per multiply-add.

        Args:
            attention: of a layer.
            num_layers: that have it.
            hidden_size: width of the residual stream.
            mlp_parameters: of all layers' MLPs, as far as one token goes through them.
            vocab_size: rows of the output layer.
        """
        weights = num_layers * attention.parameters(hidden_size) + mlp_parameters
        per_pair = attention.num_heads * (attention.head_dim + attention.value_dim)
        return cls(
            per_token=2.0 * weights,
            per_attention_pair=2.0 * num_layers * per_pair,
            per_loss_token=2.0 * hidden_size * vocab_size,
        )

    @classmethod
    def from_config(
        cls,
        config: Any,
        vocab_size: int,
        windows: Sequence[int | None],
        hybrid_layer_pattern: str | None = None,
    ) -> CostModel:
        """Of the model of a ``TransformerConfig``, whose vocabulary is not padded.

        Args:
            config: of the model.
            vocab_size: rows of the output layer.
            windows: as in ``within_windows``; None for layers that do not attend.
            hybrid_layer_pattern: of a ``HybridModel``.

        Raises:
            NotImplementedError: as ``layer_kinds`` does.
        """
        kinds, hidden = layer_kinds(config, hybrid_layer_pattern), config.hidden_size
        matrices = 3 if config.gated_linear_unit else 2
        widths = sum(active_ffn_hidden_size(config, kind) for kind in kinds)
        seen = [window for window, kind in zip(windows, kinds, strict=True) if kind.attends]
        model = cls.from_attention(
            AttentionSizes.from_config(config),
            len(seen),
            hidden,
            matrices * hidden * widths,
            vocab_size,
        ).within_windows(seen)
        for rule in {rule for kind in kinds if (rule := kind.rule) is not None}:
            number = sum(kind.rule == rule for kind in kinds)
            linear = LinearSizes.from_config(config, rule)
            model = model.with_linear_layers(linear, number, hidden)
        return model

    def with_linear_layers(
        self, linear: LinearSizes, num_layers: int, hidden_size: int
    ) -> CostModel:
        """The same model with so many layers more that carry a state: they cost no pairs.

        Args:
            linear: of these layers, whose MLPs are counted already.
            num_layers: how many.
            hidden_size: width of the residual stream.
        """
        each = 2.0 * linear.parameters(hidden_size) + linear.scan_flops
        return replace(self, per_token=self.per_token + num_layers * each)

    def within_windows(self, windows: Sequence[int | None]) -> CostModel:
        """The same model, some layers of which have a window.

        Args:
            windows: of every layer, keys that a token sees before itself; None sees all.
        """
        if not windows:
            return self
        per_layer, numbers = self.per_attention_pair / len(windows), Counter(windows)
        return replace(
            self,
            per_attention_pair=numbers.pop(None, 0) * per_layer,
            per_window_pair=tuple(
                (window, number * per_layer)
                for window, number in numbers.items()
                if window is not None
            ),
        )

    def attention(self, tree: PrefixTree, segments: BoolArray | None = None) -> float:
        """Cost of the visible pairs of a tree, or of some ``segments`` of it, in all layers."""
        costs = ((None, self.per_attention_pair), *self.per_window_pair)
        return sum(cost * pairs_within(tree, window, segments) for window, cost in costs if cost)

    def estimate(
        self, tree: PrefixTree, loss_tokens: int = 0, segments: BoolArray | None = None
    ) -> float:
        """Cost of a tree whose samples train ``loss_tokens`` tokens; several trees add up.

        Args:
            tree: what is shared.
            loss_tokens: that are trained.
            segments: ``[num_segments]`` that stand in the row, with all before them on their paths;
                None takes all.
        """
        lens = tree.segment_lens
        tokens = int((lens if segments is None else lens[segments]).sum())
        return (
            self.per_token * tokens
            + self.attention(tree, segments)
            + self.per_loss_token * loss_tokens
        )


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
