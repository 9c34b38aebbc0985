"""Rotary positions of their own in layers with a window, in config.json's spellings."""

from __future__ import annotations

from typing import Any

from .config_values import ConfigValues
from .rope import read_rope, read_rotary_percent

_FULL, _WINDOWS = "full_attention", "sliding_attention"


def read_layer_ropes(values: ConfigValues, bases: tuple[float, float]) -> dict[str, Any]:
    """Fields of ``HfModel``, and ``window_rotary_base``.

    Args:
        values: of the file: ``rope_parameters`` by kind of layer, or ``rope_theta`` and
            ``rope_scaling`` of full attention beside ``rope_local_base_freq``.
        bases: what transformers takes for full attention and for windows where there are none.

    Raises:
        ValueError: of ``read_rope``.
        NotImplementedError: likewise, and scaled positions in layers with a window.
    """
    kinds = ConfigValues(values.section("rope_parameters"), values.where)
    if not kinds.config.keys() <= {_FULL, _WINDOWS}:
        named = sorted(kinds.config)
        values.refused.append(f"rope_parameters of {named} (must be {_FULL}, {_WINDOWS})")
    full_section, windows_section = kinds.section(_FULL), kinds.section(_WINDOWS)
    values.problems += kinds.problems
    if full_section.get("truncate") is False:
        values.refused.append("truncate=false by kind of layer, where transformers ignores it")
    full = _read(values, values.config | dict(rope_parameters=full_section), bases[0])
    old = values.config.get("rope_local_base_freq")
    theta = {} if old is None else dict(rope_theta=old)
    windows = _read(values, theta | dict(rope_parameters=windows_section), bases[1])
    values.known |= {"rope_theta", "rope_scaling", "rope_local_base_freq"}
    if windows["rope_type"] != "default":
        values.refused.append(f"rope type {windows['rope_type']!r} in layers with a window")
    return full | dict(window_rotary_base=windows["rotary_base"])


def _read(values: ConfigValues, config: dict[str, Any], base: float) -> dict[str, Any]:
    part = ConfigValues(config, values.where)
    read_rotary_percent(part, None)
    fields = read_rope(part, base)
    values.problems += part.problems
    values.refused += part.refused
    return fields


def layer_ropes_json(config: dict[str, Any], window_base: float) -> dict[str, Any]:
    """A ``config.json`` whose positions, of ``rope_json``, become those of full attention."""
    windows = dict(rope_type="default", rope_theta=window_base)
    kinds = {_FULL: config["rope_parameters"], _WINDOWS: windows}
    old = dict(rope_local_base_freq=window_base)
    return config | dict(rope_parameters=kinds) | old
