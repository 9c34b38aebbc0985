"""Qwen3-Next: Gated DeltaNet, gated attention, and experts, one of which takes every token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    GatedDeltaModel,
    GatedExpertsModel,
    kind_of_experts,
    pattern_of_sparse_step,
    register,
    sparse_step_json,
)
from ..table import Piece, Row


@register("Qwen3NextForCausalLM", "qwen3_next")
@dataclass(frozen=True, kw_only=True)
class Qwen3Next(GatedDeltaModel, GatedExpertsModel):
    """As its parts; a linear layer's projections are stored key head by key head."""

    @classmethod
    def read_normalisation(cls, values: ConfigValues) -> bool:
        """See ``ExpertsModel``; true where the file has none."""
        return values.flag("norm_topk_prob", True)

    @classmethod
    def read_pattern(cls, values: ConfigValues, num_layers: int) -> tuple[int, ...]:
        """See ``ExpertsModel``."""
        return pattern_of_sparse_step(values, num_layers)

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        keys = dict(norm_topk_prob=self.norm_topk_prob) | sparse_step_json(self)
        return super().config_json() | keys

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """See ``HfModel``; Qwen3.5 with experts in all layers has the same."""
        return kind_of_experts(read) == "linear"

    def linear_input(self, ours: str, theirs: str) -> Row:
        """See ``GatedDeltaModel``."""
        per_key = self.linear_num_value_heads // self.linear_num_key_heads
        width, wide = self.linear_key_head_dim, per_key * self.linear_value_head_dim
        tensors = {
            f"{theirs}in_proj_qkvz.weight": (width, width, wide, wide),
            f"{theirs}in_proj_ba.weight": (per_key, per_key),
        }
        shapes: dict[str, tuple[int, ...]] = {
            name: (self.linear_num_key_heads * sum(widths), self.hidden_size)
            for name, widths in tensors.items()
        }
        blocks = [block for item in tensors.items() for block in self._by_head(*item)]
        return Row(ours, shapes, tuple(blocks))

    def _by_head(self, tensor: str, widths: tuple[int, ...]) -> Iterator[tuple[Piece, ...]]:
        """For every part of a key head's rows, those of all key heads."""
        start = 0
        for width in widths:
            starts = [head * sum(widths) + start for head in range(self.linear_num_key_heads)]
            yield tuple(Piece(tensor, first, first + width) for first in starts)
            start += width
