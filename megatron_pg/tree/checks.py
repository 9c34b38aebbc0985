"""What is given from outside, as lengths and runs of integers, or refused by its name."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Of a row: kernels count in int32.
MAX_TOKENS = 2**31 - 1


def as_length(name: str, value: Any) -> int:
    """``value`` as a positive int. Raises: ValueError naming ``name`` otherwise."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not 1 <= int(value) <= MAX_TOKENS:
        raise ValueError(f"{name}={value} must be at least 1 and at most {MAX_TOKENS}")
    return int(value)


def as_list(name: str, values: Any) -> list[Any]:
    """``values`` in their order. Raises: ValueError naming ``name`` if they have none."""
    if isinstance(values, str | bytes | Set | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    return list(values)


def as_integers(name: str, values: Any) -> IntArray:
    """``values`` as ``[n]`` int64. Raises: ValueError naming ``name`` if they are no integers."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a run of integers on the CPU: {error}") from error
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a one-dimensional run of integers (exactly one dimension), "
            f"got shape {array.shape} and dtype {array.dtype}"
        )
    if array.dtype == np.uint64 and (array > np.iinfo(np.int64).max).any():
        raise ValueError(f"{name} holds {array.max()}, which is no int64")
    integers: IntArray = array.astype(np.int64, copy=False)
    return integers
