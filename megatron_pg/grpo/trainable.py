"""Model chunks that a step can predict with and train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..mcore import PrefixGroupedModel


def checked_chunks(name: str, chunks: Sequence[Any], vocab_size: int) -> list[Any]:
    """The chunks as a list, if they can predict over packed rows."""
    if not isinstance(chunks, Sequence) or not chunks:
        raise ValueError(
            f"{name} must be a list of at least one model chunk, got a {type(chunks).__name__}; "
            "pass [model]"
        )
    for chunk in chunks:
        model = unwrapped(chunk)
        if not isinstance(model, PrefixGroupedModel):
            raise ValueError(
                f"{name} has a {type(model).__name__}, which does not predict over packed rows; "
                "build a megatron_pg.mcore.PrefixGroupedGPTModel or PrefixGroupedHybridModel from "
                "the wrapped spec"
            )
        if model.vocab_size < vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size}, but {name} was built for {model.vocab_size} entries; "
                "pass the number of entries without padding"
            )
    return list(chunks)


def unwrapped(chunk: Any) -> Any:
    """The model in what wraps it for training."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def check_trainable(chunks: Sequence[Any], config: Any) -> None:
    """Raise ValueError unless gradients of packed rows come out whole and unscaled."""
    problems = []
    if not all(hasattr(chunk, "zero_grad_buffer") for chunk in chunks):
        raise ValueError(
            "chunks have no gradient buffers; wrap each in "
            "megatron.core.distributed.DistributedDataParallel"
        )
    settings = [getattr(chunk, "ddp_config", None) for chunk in chunks]
    gathers = any(getattr(of_chunk, "overlap_param_gather", False) for of_chunk in settings)
    if gathers or config.param_sync_func is not None:
        problems.append(
            "overlap_param_gather=True lets modules wait for their weights when they are called, "
            "but logprobs and samples read the output layer's without a call; set it to False"
        )
    reduces_beside = any(getattr(of_chunk, "overlap_grad_reduce", False) for of_chunk in settings)
    if reduces_beside and config.no_sync_func is None:
        problems.append(
            "overlap_grad_reduce=True without no_sync_func starts the reduction after as many "
            "backward passes as the first step made, and packing changes their number; set "
            "no_sync_func to the chunk's no_sync (a list for several chunks)"
        )
    if not config.calculate_per_token_loss:
        problems.append(
            "calculate_per_token_loss=False divides the loss by the number of microbatches, which "
            "packing changes; build the model with calculate_per_token_loss=True"
        )
    if config.finalize_model_grads_func is None:
        problems.append(
            "finalize_model_grads_func=None leaves gradients unreduced; set it to "
            "megatron.core.distributed.finalize_model_grads"
        )
    if problems:
        raise ValueError(
            "the model's configuration cannot train packed rows: " + "; ".join(problems)
        )
