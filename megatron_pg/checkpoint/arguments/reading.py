"""A model made from the ``args`` of a Megatron-LM checkpoint, and ``args`` held against a model."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..description import FAMILIES, NEED, ArgumentValues, HfModel
from .checks import check_arguments


def hf_model_from_args(args: Namespace, where: str) -> HfModel:
    """The model that a checkpoint's ``args`` describe.

    Raises:
        ValueError: an argument is missing, or no value of its kind.
        NotImplementedError: the model has no counterpart among the supported architectures, or an
            argument is set of which nothing is known.
    """
    read = ArgumentValues(_values(args, where), where)
    family = _family(read).of_arguments(read)
    model = family(**family.read_arguments(read), dtype=read.dtype())
    check_arguments(args, model, where, by_configuration=False)
    return model


def check_args(args: Namespace, model: HfModel, where: str) -> None:
    """Refuse a checkpoint whose ``args`` contradict the model that a ``config.json`` describes.

    Raises:
        ValueError: listing every argument under which the weights are another model's.
    """
    _values(args, where)
    check_arguments(args, model, where, by_configuration=True)


def _family(read: ArgumentValues) -> type[HfModel]:
    """The recorded one, or the one with such layers."""
    given = read.get("hf_architecture")
    if given is not None:
        if not isinstance(given, str) or given not in FAMILIES:
            read.refuse("hf_architecture", given, f"one of {', '.join(FAMILIES)}")
        return FAMILIES[given]
    found = [family for family in FAMILIES.values() if family.is_of_arguments(read)]
    # Families whose layers are all alike do not ask for a pattern of them.
    found = [family for family in found if family.symbols] or found
    if len(found) != 1:
        named = " or ".join(family.architecture for family in found) or "no family that is held"
        raise ValueError(f"{read.where}: args are of {named}; {NEED}")
    return found[0]


def _values(args: Any, where: str) -> dict[str, Any]:
    if not isinstance(args, Namespace):
        raise ValueError(f"{where}: args are {type(args).__name__}, not a Namespace; {NEED}")
    for name, value in vars(args).items():
        # Neither true nor false, and equal to nothing.
        if hasattr(value, "__array__"):
            raise ValueError(f"{where}: args hold {type(value).__name__} as {name}; {NEED}")
    return vars(args)
