"""Refusals that several modules share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor


def check_name(what: str, value: str, valid: Iterable[str]) -> None:
    """Raise ValueError with the nearest valid name unless ``value`` is one of ``valid``."""
    names = sorted(valid)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what}={value!r} must be one of {', '.join(names)}{hint}")


def check_at_least(what: str, value: float, bound: float, *, strict: bool = False) -> None:
    """Raise ValueError unless ``value`` is finite and at least (above, if strict) ``bound``."""
    if not math.isfinite(value) or value < bound or (strict and value == bound):
        rule = "above" if strict else "at least"
        raise ValueError(f"{what}={value} must be finite and {rule} {bound:g}")


def check_same_length(reference_name: str, reference: Tensor, **arrays: Tensor | None) -> None:
    """Raise ValueError unless all arrays have one dimension and the length of ``reference``."""
    for name, array in {reference_name: reference, **arrays}.items():
        if array is not None and (array.ndim != 1 or len(array) != len(reference)):
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}, it must have one dimension and the "
                f"length of {reference_name}, whose shape is {tuple(reference.shape)}"
            )


def check_indices(name: str, ids: Tensor, stop: int) -> None:
    """Raise ValueError unless ``ids`` is a one-dimensional int64 CPU tensor in ``[0, stop)``."""
    if ids.device.type != "cpu" or ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(
            f"{name} must be a one-dimensional int64 tensor on the CPU (it is read without "
            f"waiting for the device), got shape {tuple(ids.shape)}, {ids.dtype} on {ids.device}"
        )
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= stop):
        raise ValueError(
            f"{name} must lie in [0, {stop}), got values from {int(ids.min())} to {int(ids.max())}"
        )
