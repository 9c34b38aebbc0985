"""What a Megatron checkpoint holds besides the model's parameters, and what of it may be left.

Optimizer state, random states and empty extra states belong to training; anything else that no
parameter of the table is read from would be lost without a word, so it is refused by name.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_EXTRA_STATE = re.compile(r"\._extra_state(/shard_[\d.]+_[\d.]+)?$")
_PICKLES_OF_NONE = {pickle.dumps(None, protocol) for protocol in range(6)}
_OPTIMIZER = re.compile(r"(chained_\d+\.)*optimizer\.")
# Random states and re-run records belong to ranks of the layout that saved them.
_PER_RANK = re.compile(r"(rng_state|rerun_state_machine(_state)?)(/|$)")
# Entries of common.pt (legacy: of a rank's file) that are training state.
_TRAINING_ENTRY = re.compile(r"optimizer|opt_param_scheduler|rng_state|rerun_state_machine")


def is_optimizer_state(key: str) -> bool:
    """Whether a tensor or object of torch_dist belongs to the optimizer."""
    return _OPTIMIZER.match(key) is not None


def is_per_rank(key: str) -> bool:
    """Whether a tensor or object of torch_dist only means something to the ranks that saved it."""
    return _PER_RANK.match(key) is not None


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


def loose_tensors(common: dict[str, Any]) -> Iterator[str]:
    """Names of tensors in a ``common.pt`` that are no training state: nothing reads them."""
    for key, value in common.items():
        if not _TRAINING_ENTRY.match(key):
            yield from _tensors_in(key, value)


def _tensors_in(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors_in(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _tensors_in(f"{name}.{number}", inner)
    elif isinstance(value, Tensor | io.BytesIO) and not is_empty(value):
        yield name


def check_all_read(path: Path, names: Sequence[str]) -> None:
    """Refuse a checkpoint whose content would be lost.

    Raises:
        ValueError: naming the folder and the first of ``names``, if there are any.
    """
    if names:
        raise ValueError(
            f"{path}: {len(names)} tensor(s) or states of the model that its configuration does "
            f"not describe: {', '.join(names[:5])}; they would be lost. Pass the configuration of "
            "the model that was saved by hf_config=DIR; a model that needs them beyond that has "
            "no supported architecture"
        )
