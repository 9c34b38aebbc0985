"""What a linear layer keeps in a checkpoint beside its parameters: scales of fp8, or nothing."""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import torch
from torch import Tensor

_EXTRA_STATE = re.compile(r"\._extra_state(/shard_[\d.]+_[\d.]+)?$")
_PICKLES_OF_NONE = {pickle.dumps(None, protocol) for protocol in range(6)}


def is_extra_state(key: str) -> bool:
    """Whether an entry of a checkpoint is what a layer keeps beside its parameters."""
    return _EXTRA_STATE.search(key) is not None


def is_empty(state: Any) -> bool:
    """Whether it holds nothing: what layers save that are not quantised.

    Depending on Transformer Engine's version that is None, an empty tensor, or None serialised
    once more, as the bytes of a tensor or of a buffer.
    """
    if isinstance(state, Tensor):
        is_bytes = state.dtype == torch.uint8
        held = bytes(state.flatten()[:16].tolist()) if is_bytes else None
        return not state.numel() or held in _PICKLES_OF_NONE
    if isinstance(state, io.BytesIO):
        return not state.getbuffer().nbytes or _is_empty_file(state.getvalue())
    if isinstance(state, list | tuple):
        return all(map(is_empty, state))
    return state is None


def _is_empty_file(serialised: bytes) -> bool:
    try:
        return is_empty(torch.load(io.BytesIO(serialised), weights_only=True))
    # What cannot be read like this is something.
    except Exception:
        return False
