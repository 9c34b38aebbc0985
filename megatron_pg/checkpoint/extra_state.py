"""What a linear layer keeps in a checkpoint beside its parameters: scales of fp8, or nothing."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

_PICKLES_OF_NONE = {pickle.dumps(None, protocol) for protocol in range(6)}


def is_extra_state(key: str) -> bool:
    """Whether an object is the state that a layer keeps beside its weights."""
    return "_extra_state/" in key


def is_empty(state: Any) -> bool:
    """Whether it holds nothing: None, or what versions of Transformer Engine make of that."""
    if isinstance(state, io.BytesIO):
        return _is_none(state.getvalue())
    if isinstance(state, Tensor):
        is_bytes = state.dtype == torch.uint8
        held = bytes(state.flatten()[:16].tolist()) if is_bytes else None
        return not state.numel() or held in _PICKLES_OF_NONE
    return state is None


def _is_none(serialised: bytes) -> bool:
    try:
        return torch.load(io.BytesIO(serialised), weights_only=True) is None
    # What cannot be read like this is something.
    except Exception:
        return False
