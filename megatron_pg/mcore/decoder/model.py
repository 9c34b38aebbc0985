"""What of a ``DecoderConfig`` is no layer's: a built model is fitted with it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from .config import DecoderConfig
from .linear import PostLayerNorm
from .rotary import RotaryByWindow, RotaryOfWindows


def fit_decoder(model: Any) -> None:
    """Give a ``GPTModel`` what its ``DecoderConfig`` names; any other is left as it is.

    Raises:
        ValueError: if its layers are not those of ``with_decoder_layers``.
    """
    config = model.config
    if not isinstance(config, DecoderConfig):
        return
    base, has_norms = config.window_rotary_base, config.has_post_layernorms
    for layer in model.decoder.layers:
        attention = layer.self_attention
        linears = attention.linear_proj, getattr(layer.mlp, "linear_fc2", None)
        if (has_norms and not all(isinstance(x, PostLayerNorm) for x in linears)) or (
            base is not None and not isinstance(attention, RotaryByWindow)
        ):
            raise ValueError(
                f"layer {layer.layer_number} has not what its configuration names "
                f"(has_post_layernorms={has_norms}, window_rotary_base={base}); build the model "
                "from a spec of with_decoder_layers"
            )
    if base is not None:
        model.rotary_pos_emb = RotaryOfWindows(model.rotary_pos_emb, _window_rotary(model, base))
    if config.embedding_multiplier is not None and model.pre_process:
        # Rounded as parameters are.
        scale = torch.tensor(config.embedding_multiplier, dtype=config.params_dtype)
        model.embedding.register_forward_hook(_scaled(scale))


def _window_rotary(model: Any, base: float) -> RotaryEmbedding:
    config = model.config
    return RotaryEmbedding(
        kv_channels=config.kv_channels,
        rotary_percent=model.rotary_percent,
        rotary_interleaved=config.rotary_interleaved,
        rotary_base=base,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=model.pg_collection.cp,
    )


def _scaled(scale: Tensor) -> Any:
    def multiply(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output * scale.to(output)

    return multiply
