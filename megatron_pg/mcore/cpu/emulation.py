"""What names CUDA in Megatron-Core and PyTorch, put in its place while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

from ..norm import norm_class
from ..versions import HAS_HYBRID_MODEL, missing_names
from . import linear_kernels, mamba_kernels


class _Stream:
    """A CUDA stream or event of a machine that has none: all work is done when called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Stream:
        return self


class _CpuInsteadOfCuda(TorchFunctionMode):
    """Sends ``device="cuda"`` to the CPU; ``Tensor.type()`` names CUDA types for optimizers.

    Memory is not pinned for a device that is not there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _emulated(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is recomputed runs outside of the mode that ``backward()`` was called in."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _CpuInsteadOfCuda():
            return function(*args, **kwargs)

    return call


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's helper converts CUDA tensors only, but its callers want numbers for splits."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_all_gather, _reduce_scatter = dist.all_gather, dist.reduce_scatter


def _gather_unequal(outputs: Any, tensor: Any, group: Any = None, async_op: bool = False) -> Any:
    """``all_gather`` of tensors of several lengths, as tokens of divided experts are."""
    longest = max(len(output) for output in outputs)
    if all(len(output) == longest for output in outputs):
        return _all_gather(outputs, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in outputs]
    _all_gather(parts, padded, group=group)
    for output, part in zip(outputs, parts):
        output.copy_(part[: len(output)])


def _reduce_scatter_unequal(output: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """``reduce_scatter`` of sums of several lengths."""
    group = kwargs.get("group")
    if args or all(part.shape == output.shape for part in inputs):
        return _reduce_scatter(output, inputs, *args, **kwargs)
    total = torch.cat(list(inputs))
    dist.all_reduce(total, group=group)
    output.copy_(total.split([len(part) for part in inputs])[dist.get_rank(group)])


def _norm(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
    norm: torch.nn.Module = norm_class(config)(config, hidden_size, eps)
    return norm


@contextmanager
def emulate_cuda() -> Iterator[None]:
    """Run Megatron-Core's CUDA-naming code on the CPU inside the ``with`` block.

    What Megatron-Core gives ``torch.compile`` runs as it is written. Everything is put back at the
    end; importing this module changes nothing. Use it with
    ``**transformer_config_defaults()`` in the ``TransformerConfig`` and
    ``model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)``; processes that save
    checkpoints guard their entry by ``if __name__ == "__main__"``.

    Raises:
        RuntimeError: where a CUDA device exists: nothing is emulated there.
    """
    if torch.cuda.is_available():
        raise RuntimeError("emulate_cuda() is for machines without CUDA; this one has a device")
    cpu = torch.device("cpu")
    with ExitStack() as stack:
        for target, name, stand_in in (
            (torch.cuda, "current_device", lambda: cpu),
            (torch.cuda, "synchronize", lambda *args, **kwargs: None),
            (torch.cuda, "current_stream", lambda *args, **kwargs: _Stream()),
            (torch.cuda, "default_stream", lambda *args, **kwargs: _Stream()),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            (torch.Tensor, "record_stream", lambda tensor, stream: None),
            (torch.cuda, "Event", _Stream),
            # Recompute saves and restores this state; there is no CUDA generator to restore.
            (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.empty(0)),
            (megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
            (token_dispatcher, "maybe_move_tensor_to_cpu", _move_to_cpu),
            (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
            (dist, "all_gather", _gather_unequal),
            (dist, "reduce_scatter", _reduce_scatter_unequal),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        kernels = (*linear_kernels.stand_ins(), *mamba_kernels.stand_ins())
        for module, name, right in (*missing_names(), *kernels):
            stack.enter_context(mock.patch.object(module, name, right, create=True))
        for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
            function = _emulated(getattr(fused_softmax, name))
            stack.enter_context(mock.patch.object(fused_softmax, name, function))
        if HAS_HYBRID_MODEL:
            from megatron.core.models.hybrid import hybrid_block

            # The norm after the last layer; no spec says which.
            stack.enter_context(mock.patch.object(hybrid_block, "TENorm", _norm))
        # Compiling for a CPU takes every process seconds, and a C++ compiler.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_CpuInsteadOfCuda())
        yield


def transformer_config_defaults() -> dict[str, Any]:
    """``TransformerConfig`` settings without which Megatron-Core does not run on the CPU."""
    return {
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
