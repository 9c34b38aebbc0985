"""Rotary positions in Hugging Face's spellings and in Megatron's: type, factor and base."""

from __future__ import annotations

from typing import Any

from .argument_values import ArgumentValues
from .config_values import ConfigValues

# What Megatron-Core computes llama3 scaling with.
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_ALLOWED: dict[str, dict[str, Any]] = {"default": {}, "linear": {}, "llama3": _LLAMA3}


def read_rope(values: ConfigValues) -> dict[str, Any]:
    """Fields of ``HfModel`` from either spelling of a ``config.json``; both present must agree.

    Raises:
        ValueError: naming the file: two values for one.
        NotImplementedError: naming the file: a type, or a setting of one, that Megatron-Core does
            not compute.
    """
    where = values.where
    new, old = values.section("rope_parameters"), values.section("rope_scaling")
    places = [values, ConfigValues(new, where), ConfigValues(old, where)]
    # The default of all these architectures in transformers is 10000.
    bases = {place.number("rope_theta", 1.0, 1e12, default=None) for place in places}
    bases = bases - {None} or {10000.0}
    if len(bases) > 1:
        raise ValueError(f"{where}: rope_theta is given as {sorted(bases)}; keep one value")
    if new and old and _scaling(new) != _scaling(old):
        raise ValueError(f"{where}: rope_parameters and rope_scaling differ; keep one of them")
    rope = _scaling(new or old)
    kind = rope.pop("rope_type")
    named = (new or old).get("type", kind)
    if not isinstance(kind, str) or kind not in _ALLOWED or named != kind:
        raise NotImplementedError(
            f"{where}: rope type {named!r} is not supported; supported are {', '.join(_ALLOWED)}"
        )
    scaled = ConfigValues(rope, where)
    factor = 1.0 if kind == "default" else scaled.number("factor", 1.0, 1e6)
    rope.pop("factor", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(f"{where}: partial_rotary_factor must be 1.0")
    if kind == "default":
        # Left over from a longer context: it does nothing without a scaling type.
        rope.pop("original_max_position_embeddings", None)
    if rope != _ALLOWED[kind]:
        raise NotImplementedError(
            f"{where}: rope type {kind!r} with {rope}; Megatron-Core computes it with "
            f"{_ALLOWED[kind]} only"
        )
    for part in (*places[1:], scaled):
        values.problems += part.problems
    return dict(rope_type=kind, rope_factor=factor, rotary_base=bases.pop())


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """A rope section without its base, its type under one name."""
    named = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    return named | dict(rope_type=rope.get("rope_type") or rope.get("type") or "default")


def rope_json(rope_type: str, factor: float, base: float) -> dict[str, Any]:
    """Keys of a ``config.json`` in both spellings, for transformers 4 and 5."""
    rope: dict[str, Any] = dict(rope_type=rope_type)
    if rope_type != "default":
        rope["factor"] = factor
    rope |= _ALLOWED[rope_type]
    return dict(
        rope_theta=base,
        rope_scaling=None if rope_type == "default" else rope,
        rope_parameters=rope | dict(rope_theta=base),
    )


def read_rope_arguments(read: ArgumentValues) -> dict[str, Any]:
    """Fields of ``HfModel`` from Megatron-LM's arguments."""
    rope_type, factor = "default", 1.0
    if read.get("use_rope_scaling"):
        rope_type, factor = "llama3", read.number("rope_scaling_factor", 8.0)
    elif read.get("rotary_seq_len_interpolation_factor"):
        rope_type, factor = "linear", read.number("rotary_seq_len_interpolation_factor")
    base = read.number("rotary_base", 10000.0)
    return dict(rope_type=rope_type, rope_factor=factor, rotary_base=base)


def rope_arguments(rope_type: str, factor: float, base: float) -> dict[str, Any]:
    """Megatron-LM's arguments."""
    return dict(
        position_embedding_type="rope",
        rotary_base=base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=rope_type == "llama3",
        rope_scaling_factor=factor,
        rotary_seq_len_interpolation_factor=factor if rope_type == "linear" else None,
    )
