"""Patterns over layers in Megatron-LM's arguments: a list, or a number that stands for one."""

from __future__ import annotations

from typing import Any

from .argument_values import ArgumentValues

# argument -> what every n-th layer has where it is the number n (the others have the contrary),
# and the number of the first of them
_NTH = dict(
    window_attn_skip_freq=(0, None),
    no_rope_freq=(1, None),
    moe_layer_freq=(1, 0),
    linear_attention_freq=(0, None),
)


def expand_pattern(name: str, value: Any, num_layers: int) -> Any:
    """The list that a number stands for; anything else as it is."""
    if name not in _NTH or type(value) is not int or value < 1:
        return value
    nth, first = _NTH[name]
    first = value - 1 if first is None else first
    return [nth if (layer - first) % value == 0 else 1 - nth for layer in range(num_layers)]


def read_pattern(read: ArgumentValues, name: str, num_layers: int) -> tuple[int, ...] | None:
    """0 or 1 for every layer; None where nothing is given.

    Raises:
        ValueError: of ``ArgumentValues.refuse``.
    """
    value = expand_pattern(name, read.get(name), num_layers)
    if value is None:
        return None
    is_list = isinstance(value, list | tuple) and len(value) == num_layers
    if not is_list or any(item not in (0, 1) for item in value):
        read.refuse(name, value, f"0 or 1 for each of num_layers={num_layers}, or a number above 0")
    return tuple(map(int, value))
