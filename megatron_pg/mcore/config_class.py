"""Which class of configuration holds a model's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


def transformer_config_class(settings: Mapping[str, Any]) -> type[TransformerConfig]:
    """``MLATransformerConfig`` where the settings ask for latent attention."""
    is_latent = settings.get("multi_latent_attention")
    cls: type[TransformerConfig] = MLATransformerConfig if is_latent else TransformerConfig
    return cls
