"""Indices of a row on their way to a device, whatever values hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..tree import to_device


def on_device(value: Any, device: torch.device) -> Any:
    """The same values with all their tensors on the device, brought there in one copy."""
    return _with_tensors(value, iter(to_device(list(_tensors(value)), device)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors(tuple(getattr(value, part.name) for part in fields(value)))


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(_with_tensors(part, tensors) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        return type(value)(**{name: _with_tensors(x, tensors) for name, x in parts.items()})
    return value
