"""Qwen2 and Qwen2.5: biases in the query, key and value projections alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..description import ArgumentValues, HfModel, WindowBySwitch, register


@register("Qwen2ForCausalLM", "qwen2")
@dataclass(frozen=True, kw_only=True)
class Qwen2(HfModel):
    """As ``HfModel``, with these biases."""

    windows = WindowBySwitch()

    @property
    def add_qkv_bias(self) -> bool:
        """Always."""
        return True

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``."""
        has_bias = read.get("add_qkv_bias") and not read.get("add_bias_linear")
        return bool(has_bias and not read.get("num_experts") and not read.get("qk_layernorm"))
