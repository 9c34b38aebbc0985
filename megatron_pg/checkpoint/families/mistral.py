"""Mistral, where its window is off: Llama's layers, without biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import ConfigValues, HfModel, register


@register("MistralForCausalLM", "mistral")
@dataclass(frozen=True, kw_only=True)
class Mistral(HfModel):
    """A file without ``sliding_window`` has one of 4096, and there is no switch to it."""

    own_defaults = ("num_key_value_heads", "sliding_window")

    @classmethod
    def uses_window(cls, values: ConfigValues) -> bool:
        """Other families' switch is ignored, as transformers ignores it."""
        super().uses_window(values)
        return True

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(sliding_window=None)
