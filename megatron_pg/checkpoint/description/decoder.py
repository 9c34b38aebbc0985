"""What a decoder is: its sizes, what Megatron-Core builds of it, and which weights it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...parallel import ModelSizes
from ..table import (
    EMBEDDING,
    HEAD,
    Row,
    columns,
    gated_mlp,
    grouped_qkv,
    vocabulary,
    whole,
)
from .window import Window
from .yarn import Yarn

# What this package, Megatron-LM's arguments and TransformerConfig call alike.
_SHARED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Llama without biases; a family says where it differs.

    Attributes:
        qk_layernorm: whether queries and keys are normalised per head.
        layer_norms: Megatron's names of the norms around attention and MLP, and Hugging Face's.
        rotary_percent: part of a head's channels that positions rotate, the first ones.
        num_experts: of a layer that has experts; None where none has.
        is_latent: whether keys and values come out of a latent (multi-latent attention).
        has_positions: whether rotary embeddings encode them.
        embedding: Hugging Face's name of the token embedding.
        layers: with what its names of layers begin.
        last_norm: names of the norm behind the last layer, Megatron's and Hugging Face's.
        yarn: what YaRN scales with; None for other rope types.
        window: of layers that attend to the last tokens alone; None without such.
    """

    qk_layernorm: ClassVar[bool] = False
    layer_norms: ClassVar[dict[str, str]] = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    is_latent: ClassVar[bool] = False
    has_positions: ClassVar[bool] = True
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    layers: ClassVar[str] = "model.layers."
    last_norm: ClassVar[tuple[str, str]] = "decoder.final_layernorm.weight", "model.norm.weight"

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    layernorm_epsilon: float
    vocab_size: int
    max_sequence_length: int
    rotary_base: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    yarn: Yarn | None = None
    window: Window | None = None
    rotary_percent: float = 1.0
    tied: bool = False
    add_bias_linear: bool = False
    num_experts: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def add_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.add_bias_linear

    @property
    def is_homogeneous(self) -> bool:
        """Whether all layers have the same parameters."""
        return True

    @property
    def is_hybrid(self) -> bool:
        """Whether it is a ``HybridModel``, whose layers a pattern names."""
        return False

    def has_linear_attention(self, layer: int) -> bool:
        """Whether a layer's attention is linear: a state that goes from token to token."""
        return False

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, and not one MLP."""
        return False

    def in_megatron(self) -> dict[str, Any]:
        """What ``TransformerConfig`` and Megatron-LM's arguments say under one name."""
        return {name: getattr(self, name) for name in _SHARED}

    # What Megatron-Core builds.

    @property
    def sizes(self) -> ModelSizes:
        """What parallel ranks divide."""
        return ModelSizes(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            num_layers=self.num_layers,
            widths={"ffn_hidden_size": self.ffn_hidden_size},
        )

    def transformer_config(self) -> dict[str, Any]:
        """Settings of ``make_transformer_config`` that the architecture fixes.

        Parallel sizes, ``params_dtype``, recompute and fusions stay the caller's.
        """
        return dict(
            **self.in_megatron(),
            **self.rope_config(),
            **({} if self.window is None else self.window.in_megatron()),
            layernorm_epsilon=self.layernorm_epsilon,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )

    def rope_config(self) -> dict[str, Any]:
        """What of rotary positions the configuration says, and not ``gpt_model``."""
        return {} if self.yarn is None else self.yarn.transformer_config(self.rope_factor)

    def gpt_model(
        self, *, tp_size: int = 1, make_vocab_size_divisible_by: int = 1
    ) -> dict[str, Any]:
        """Keyword arguments of ``GPTModel``; the vocabulary is padded for ``tp_size`` ranks."""
        return dict(
            vocab_size=self.padded_vocab_size(tp_size, make_vocab_size_divisible_by),
            max_sequence_length=self.max_sequence_length,
            position_embedding_type="yarn" if self.yarn and not self.is_latent else "rope",
            rotary_base=self.rotary_base,
            rotary_percent=self.rotary_percent,
            share_embeddings_and_output_weights=self.tied,
            rope_scaling=self.rope_type == "llama3",
            rope_scaling_factor=self.rope_factor,
            seq_len_interpolation_factor=self.rope_factor if self.rope_type == "linear" else None,
        )

    def check_positions(self, max_positions: int) -> None:
        """Refuse samples longer than those for which the same positions are meant.

        Raises:
            ValueError: rope type "dynamic", which has others for every length beyond its context.
        """
        if self.rope_type == "dynamic" and max_positions > self.max_sequence_length:
            raise ValueError(
                f"max_position_embeddings={max_positions} with rope type 'dynamic', whose "
                "frequencies beyond the context depend on a sample's length; at most "
                f"{self.max_sequence_length}"
            )

    def padded_vocab_size(self, tp_size: int = 1, make_vocab_size_divisible_by: int = 1) -> int:
        """Vocabulary rounded up to ``make_vocab_size_divisible_by * tp_size``, as Megatron-LM.

        Raises:
            ValueError: if one of the two is below 1.
        """
        if tp_size < 1 or make_vocab_size_divisible_by < 1:
            raise ValueError(
                f"tp_size={tp_size} and make_vocab_size_divisible_by="
                f"{make_vocab_size_divisible_by} must be at least 1"
            )
        multiple = make_vocab_size_divisible_by * tp_size
        return -(-self.vocab_size // multiple) * multiple

    # Which weights there are. ``ours`` and ``theirs`` are prefixes of names.

    def weights(self, padded_vocab_size: int) -> Iterator[Row]:
        """The rows of the weight table."""
        shape = self.vocab_size, self.hidden_size
        yield vocabulary(EMBEDDING, self.embedding, shape, padded_vocab_size)
        for layer in range(self.num_layers):
            names = f"decoder.layers.{layer}.", f"{self.layers}{layer}."
            yield from self.layer_weights(layer, *names)
        yield whole(*self.last_norm, (self.hidden_size,))
        if not self.tied:
            yield vocabulary(HEAD, "lm_head.weight", shape, padded_vocab_size)

    def layer_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """Rows of one layer."""
        for name, tensor in self.layer_norms.items():
            yield whole(f"{ours}{name}.weight", f"{theirs}{tensor}.weight", (self.hidden_size,))
        yield from self.attention_weights(f"{ours}self_attention.", f"{theirs}self_attn.")
        yield from self.mlp_weights(layer, ours, theirs)

    def attention_weights(self, ours: str, theirs: str) -> Iterator[Row]:
        """Rows of one layer's attention."""
        heads, width, hidden = self.num_attention_heads, self.kv_channels, self.hidden_size
        sizes = dict(num_heads=heads, num_groups=self.num_query_groups, width=width)
        for kind, rest in ("weight", (hidden,)), ("bias", ()):
            if kind == "weight" or self.add_qkv_bias:
                tensors = [f"{theirs}{part}_proj.{kind}" for part in "qkv"]
                yield grouped_qkv(f"{ours}linear_qkv.{kind}", tensors, **sizes, rest=rest)
        out = f"{theirs}o_proj."
        yield columns(f"{ours}linear_proj.weight", f"{out}weight", (hidden, heads * width))
        if self.add_bias_linear:
            yield whole(f"{ours}linear_proj.bias", f"{out}bias", (hidden,))
        if self.qk_layernorm:
            for part in "qk":
                norm = f"{theirs}{part}_norm.weight"
                yield whole(f"{ours}{part}_layernorm.weight", norm, (width,))

    def mlp_weights(self, layer: int, ours: str, theirs: str) -> Iterator[Row]:
        """Rows of one layer's MLP, or of what it has in its place."""
        sizes = self.hidden_size, self.ffn_hidden_size
        names = f"{ours}mlp.", f"{theirs}mlp."
        return gated_mlp(*names, *sizes, has_bias=self.add_bias_linear)
