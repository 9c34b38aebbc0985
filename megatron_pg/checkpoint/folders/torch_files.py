"""Reads ``.pt`` files, and says whether what was read is something to work on.

``torch.load(weights_only=True)`` runs no code, but builds lists that hold themselves, nestings
without end, and tensors without values.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import megatron.core  # noqa: F401 (tells torch which types in a checkpoint's args are safe)
import torch
from torch import Tensor

# Far beyond what training keeps: optimizer groups nest five deep.
_MAX_DEPTH, _MAX_VALUES = 50, 1_000_000


def load_torch_file(
    path: Path, content: BinaryIO | None = None, *, trust_pickle: bool = False
) -> Any:
    """Read a ``.pt`` file; without trust only tensors and plain values are built.

    A pickled file can run any program when it is read. What Megatron-LM writes besides tensors
    (its arguments) is on a short list that is safe.

    Args:
        path: of the file.
        content: of the file, where it has been read already.
        trust_pickle: allow any object.

    Raises:
        ValueError: naming the file: missing, damaged, or with objects that need trust.
    """
    if content is None and not path.is_file():
        raise ValueError(f"{path}: missing; the checkpoint is incomplete")
    try:
        value = torch.load(content or path, map_location="cpu", weights_only=not trust_pickle)
    except Exception as error:
        reason = unpickling_reason(error)
        if "pickled objects" in reason:
            raise ValueError(
                f"{path}: holds {reason}; reading them runs code from the file. Restore the file; "
                "or, where you trust its origin, read it with trust_pickle=True (what has no such "
                "argument: take the folder that megatron_to_hf writes with it)"
            ) from None
        raise ValueError(f"{path}: not readable ({reason}); restore the file") from error
    if flaw := problem_of(value):
        raise ValueError(f"{path}: holds {flaw}; restore the file")
    return value


def named_entries(value: Any, path: Path) -> dict[str, Any]:
    """What a file holds by name.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        kind = (
            "a dict whose keys are not all text"
            if isinstance(value, dict)
            else type(value).__name__
        )
        raise ValueError(f"{path}: holds {kind}, must be a dict by name; restore the file")
    return value


def unpickling_reason(error: Exception) -> str:
    """Why ``torch.load(weights_only=True)`` fails, in a few words: it prints a page."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named or "weights_only" in str(error).lower():
        return f"pickled objects ({named[1][:200] if named else 'of an unknown kind'})"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def problem_of(value: Any) -> str | None:
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
