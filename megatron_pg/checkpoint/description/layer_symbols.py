"""Which kind of layer is where, by the symbols of a hybrid's pattern."""

from __future__ import annotations

from ...data import HYBRID_SYMBOLS
from .argument_values import ArgumentValues
from .config_values import ConfigValues
from .hf_model import MAX_LAYERS


def symbols_of_config(values: ConfigValues) -> str:
    """Of all layers of a ``config.json``: by a list of names, or the pattern of older files.

    Empty where there is neither.
    """
    names, pattern = values.get("layers_block_type"), values.get("hybrid_override_pattern")
    if isinstance(names, list) and all(isinstance(x, str) and x in HYBRID_SYMBOLS for x in names):
        return "".join(HYBRID_SYMBOLS[name] for name in names)
    is_given = names is None and isinstance(pattern, str)
    return pattern if is_given and set(pattern) <= set(HYBRID_SYMBOLS.values()) else ""


def checked_symbols(values: ConfigValues) -> str:
    """The same; what is wrong with them is left in ``values``."""
    names, pattern = values.get("layers_block_type"), values.get("hybrid_override_pattern")
    count = values.size("num_hidden_layers", MAX_LAYERS, default=None)
    found = symbols_of_config(values)
    if not found:
        values.problems.append(
            f"layers_block_type={names!r:.80}, hybrid_override_pattern={pattern!r:.80}: name "
            f"{', '.join(HYBRID_SYMBOLS)} of every layer"
        )
        return "-"
    if pattern not in (None, found):
        values.problems.append(
            f"hybrid_override_pattern={pattern!r:.80} contradicts layers_block_type"
        )
    if len(found) > MAX_LAYERS or count not in (None, len(found)):
        values.problems.append(f"num_hidden_layers={count} contradicts {len(found)} named layers")
    return found


def symbols_json(symbols: str) -> dict[str, str | int]:
    """Keys of a ``config.json``: the pattern and the layers of older files, which all readers know.

    Versions of transformers name layers differently; inference engines read the pattern alone.
    """
    return dict(num_hidden_layers=len(symbols), hybrid_override_pattern=symbols)


def pattern_of_arguments(read: ArgumentValues) -> object:
    """What Megatron-LM's arguments say of a hybrid's layers; None of other models."""
    return read.get("hybrid_layer_pattern") or read.get("hybrid_override_pattern")


def symbols_of_arguments(read: ArgumentValues, known: str) -> str:
    """Of all layers, by Megatron-LM's arguments.

    Args:
        read: the arguments.
        known: symbols that the family has.

    Raises:
        ValueError: on others, and on marks but those of stages.
    """
    pattern = pattern_of_arguments(read)
    symbols = pattern.replace("|", "") if isinstance(pattern, str) else ""
    if not symbols or not set(symbols) <= set(known):
        allowed = ", ".join(map(repr, known))
        read.refuse("hybrid_layer_pattern", pattern, f"made of {allowed} and '|'")
    return symbols
