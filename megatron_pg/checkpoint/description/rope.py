"""Rotary positions in Hugging Face's spellings and in Megatron's: type, factor and base."""

from __future__ import annotations

from typing import Any

from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .yarn import Yarn, read_yarn, read_yarn_arguments

# What Megatron-Core computes llama3 scaling with.
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# type -> what its section must hold besides what is asked for
_ALLOWED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {},
    "llama3": _LLAMA3,
    "yarn": {},
    # Another base for every length beyond the context: none within it, where rows are refused.
    "dynamic": {},
}
_WHY_NOT = dict(
    longrope=" (it divides every frequency by a factor of its own, which Megatron-Core does not)"
)


def read_rope(values: ConfigValues, default_base: float = 10000.0) -> dict[str, Any]:
    """Fields of ``HfModel`` from either spelling of a ``config.json``; both present must agree.

    Args:
        values: of the file.
        default_base: what transformers takes where the file has no ``rope_theta``.

    Raises:
        ValueError: naming the file: two values for one.
        NotImplementedError: naming the file: a type, or a setting of one, that Megatron-Core does
            not compute.
    """
    where = values.where
    new, old = values.section("rope_parameters"), values.section("rope_scaling")
    places = [values, ConfigValues(new, where), ConfigValues(old, where)]
    bases = {place.number("rope_theta", 1.0, 1e12, default=None) for place in places}
    bases = bases - {None} or {default_base}
    if len(bases) > 1:
        raise ValueError(f"{where}: rope_theta is given as {sorted(bases)}; keep one value")
    if new and old and _scaling(new) != _scaling(old):
        raise ValueError(f"{where}: rope_parameters and rope_scaling differ; keep one of them")
    rope = _scaling(new or old)
    kind = rope.pop("rope_type")
    named = (new or old).get("type", kind)
    if not isinstance(kind, str) or kind not in _ALLOWED or named != kind:
        raise NotImplementedError(
            f"{where}: rope type {named!r} is not supported{_WHY_NOT.get(str(named), '')}; "
            f"supported are {', '.join(_ALLOWED)}"
        )
    scaled = ConfigValues(rope, where)
    # Read on its own.
    scaled.known.add("partial_rotary_factor")
    factor = 1.0 if kind == "default" else scaled.number("factor", 1.0, 1e6)
    if kind == "default":
        # Left over from a longer context: they do nothing without a scaling type.
        scaled.known |= {"factor", "original_max_position_embeddings"}
    yarn = read_yarn(scaled, factor, values) if kind == "yarn" else None
    left = {key: value for key, value in rope.items() if key not in scaled.known}
    if left != _ALLOWED[kind]:
        raise NotImplementedError(
            f"{where}: rope type {kind!r} with {left}; Megatron-Core computes it with "
            f"{_ALLOWED[kind]} only"
        )
    for part in (*places[1:], scaled):
        values.problems += part.problems
        values.refused += part.refused
    return dict(rope_type=kind, rope_factor=factor, rotary_base=bases.pop(), yarn=yarn)


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """A rope section without its base, its type under one name."""
    named = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    return named | dict(rope_type=rope.get("rope_type") or rope.get("type") or "default")


def read_rotary_percent(values: ConfigValues, default: float | None) -> float:
    """Part of a head's channels that positions rotate, from the file or its rope section.

    Args:
        values: of the file; what is wrong is left in it.
        default: where the file has none; None for families that rotate whole heads.
    """
    sections = [values.section(key) for key in ("rope_parameters", "rope_scaling")]
    places = [values, *(ConfigValues(section, values.where) for section in sections)]
    found = {place.number("partial_rotary_factor", 0.0, 1.0, default=None) for place in places}
    values.problems += [problem for place in places[1:] for problem in place.problems]
    percents = sorted(found - {None})
    if len(percents) > 1:
        values.problems.append(f"partial_rotary_factor is given as {percents}; keep one value")
    percent: float = percents[0] if percents else default or 1.0
    if default is None and percent != 1.0:
        values.refused.append(f"partial_rotary_factor={percent!r} (must be 1.0)")
    return percent


def check_rotated(width: int, percent: float, values: ConfigValues) -> None:
    """Positions turn pairs of channels; what is wrong is left in ``values``."""
    rotated = int(width * percent)
    if percent != 1.0 and (rotated % 2 or not rotated):
        values.problems.append(
            f"partial_rotary_factor={percent:g} rotates {rotated} of {width} channels, no pairs"
        )


def rope_json(rope_type: str, factor: float, base: float, yarn: Yarn | None) -> dict[str, Any]:
    """Keys of a ``config.json`` in both spellings, for transformers 4 and 5."""
    rope: dict[str, Any] = dict(rope_type=rope_type)
    if rope_type != "default":
        rope["factor"] = factor
    rope |= _ALLOWED[rope_type] if yarn is None else yarn.config_json()
    return dict(
        rope_theta=base,
        rope_scaling=None if rope_type == "default" else rope,
        rope_parameters=rope | dict(rope_theta=base),
    )


def read_rope_arguments(read: ArgumentValues) -> dict[str, Any]:
    """Fields of ``HfModel`` from Megatron-LM's arguments."""
    rope_type, factor, yarn = "default", 1.0, None
    if read.get("position_embedding_type") == "yarn":
        rope_type, factor = "yarn", read.number("rotary_scaling_factor", 1.0)
        yarn = read_yarn_arguments(read)
    elif read.get("use_rope_scaling"):
        rope_type, factor = "llama3", read.number("rope_scaling_factor", 8.0)
    elif read.get("rotary_seq_len_interpolation_factor"):
        rope_type, factor = "linear", read.number("rotary_seq_len_interpolation_factor")
    elif read.get("hf_dynamic_rope_factor"):
        rope_type, factor = "dynamic", read.number("hf_dynamic_rope_factor")
    base = read.number("rotary_base", 10000.0)
    return dict(rope_type=rope_type, rope_factor=factor, rotary_base=base, yarn=yarn)


def rope_arguments(rope_type: str, factor: float, base: float, yarn: Yarn | None) -> dict[str, Any]:
    """Megatron-LM's arguments."""
    return dict(
        **({} if yarn is None else yarn.megatron_arguments(factor)),
        position_embedding_type="rope" if yarn is None else "yarn",
        rotary_base=base,
        rotary_interleaved=False,
        use_rope_scaling=rope_type == "llama3",
        rope_scaling_factor=factor,
        rotary_seq_len_interpolation_factor=factor if rope_type == "linear" else None,
        # Nothing of Megatron's: other programs go on beyond the context.
        hf_dynamic_rope_factor=factor if rope_type == "dynamic" else None,
    )
