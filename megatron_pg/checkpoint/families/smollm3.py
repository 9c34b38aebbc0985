"""SmolLM3: Llama's layers, some of them without rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..description import (
    ArgumentValues,
    ConfigValues,
    HfModel,
    WindowBySwitch,
    read_pattern,
    register,
)


class _WindowBesideRotary(WindowBySwitch):
    """Where no layers are named, those without rotary positions have the window."""

    def layers(self, values: ConfigValues, num_layers: int) -> list[int]:
        """See ``WindowBySwitch``."""
        values.get("max_window_layers")
        return _read_no_rope(values, num_layers)


def _read_no_rope(values: ConfigValues, num_layers: int) -> list[int]:
    """1 for a layer without rotary positions."""
    period = values.size("no_rope_layer_interval", default=4)
    has_rope = values.get("no_rope_layers")
    if has_rope is None:
        return [int((layer + 1) % period == 0) for layer in range(num_layers)]
    is_list = isinstance(has_rope, list) and len(has_rope) >= num_layers
    if not is_list or any(type(x) not in (int, bool) or x not in (0, 1) for x in has_rope):
        values.problems.append(
            f"no_rope_layers={has_rope!r:.80} must hold 0 or 1 for all {num_layers} layers"
        )
        return [0] * num_layers
    return [1 - int(x) for x in has_rope[:num_layers]]


@register("SmolLM3ForCausalLM", "smollm3")
@dataclass(frozen=True, kw_only=True)
class SmolLM3(HfModel):
    """As ``HfModel``, with a pattern over layers.

    Attributes:
        no_rope_freq: 1 for a layer without rotary positions, 0 for one with them, in model order.
    """

    default_rotary_base = 2000000.0
    own_tied = True
    windows = _WindowBesideRotary()

    no_rope_freq: tuple[int, ...] = ()

    @classmethod
    def read_config(cls, values: ConfigValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_config(values)
        return fields | dict(no_rope_freq=tuple(_read_no_rope(values, fields["num_layers"])))

    def config_json(self) -> dict[str, Any]:
        """See ``HfModel``."""
        return super().config_json() | dict(
            no_rope_layers=[1 - x for x in self.no_rope_freq],
            # transformers has one of its own, which another vocabulary has not.
            pad_token_id=None,
        )

    @classmethod
    def is_of_arguments(cls, read: ArgumentValues) -> bool:
        """Llama with such a pattern."""
        others = "num_experts", "qk_layernorm", "add_bias_linear", "add_qkv_bias"
        return bool(read.get("no_rope_freq")) and not any(map(read.get, others))

    @classmethod
    def read_arguments(cls, read: ArgumentValues) -> dict[str, Any]:
        """See ``HfModel``."""
        fields = super().read_arguments(read)
        count = fields["num_layers"]
        pattern = read_pattern(read, "no_rope_freq", count) or (0,) * count
        return fields | dict(no_rope_freq=pattern)

    def in_megatron(self) -> dict[str, Any]:
        """See ``HfModel``."""
        pattern = list(self.no_rope_freq) if any(self.no_rope_freq) else None
        return super().in_megatron() | dict(no_rope_freq=pattern)
