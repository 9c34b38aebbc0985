"""Whether what was read from a ``.pt`` file or a record is something to work on.

``torch.load(weights_only=True)`` runs no code, but builds lists that hold themselves, nestings
without end, and tensors without values.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Far beyond what training keeps: optimizer groups nest five deep.
_MAX_DEPTH, _MAX_VALUES = 50, 1_000_000


def flaw_of(value: Any) -> str | None:
    """What keeps a value that was read from being used; None if nothing does.

    Lists, tuples, dicts and namespaces are looked into; each is counted as often as it is held.
    """
    waiting: list[tuple[int, Any]] = [(0, value)]
    num_values = 0
    while waiting:
        depth, item = waiting.pop()
        num_values += 1
        if depth > _MAX_DEPTH:
            return f"values nested more than {_MAX_DEPTH} deep"
        if num_values > _MAX_VALUES:
            return f"more than {_MAX_VALUES} values"
        if isinstance(item, Namespace) and not all(isinstance(name, str) for name in vars(item)):
            return "a Namespace with names that are no text"
        if isinstance(item, Tensor) and not _has_values(item):
            return f"a tensor that is not stored as plain values ({item.device}, {item.layout})"
        waiting += ((depth + 1, inner) for inner in _held_by(item))
    return None


def _held_by(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple | set):
        yield from item
    elif isinstance(item, Namespace):
        yield from vars(item).values()


def _has_values(tensor: Tensor) -> bool:
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    return is_plain and tensor.device.type == "cpu"
