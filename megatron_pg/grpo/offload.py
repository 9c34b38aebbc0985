"""A frozen model that is on its device only while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Offloaded:
    """Weights and buffers of a model that is not trained, kept in host memory between its passes.

    Nothing is copied back from the device: what is not trained does not change.

    Args:
        chunks: of the model, frozen; their tensors move to the host at once.
        device: where they compute.

    Raises:
        ValueError: if a parameter is trained.
    """

    def __init__(self, chunks: Sequence[Any], device: torch.device) -> None:
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        if any(parameter.requires_grad for parameter in parameters):
            raise ValueError(
                "a model whose parameters require gradients cannot be offloaded: the host's copy "
                "would not follow them; freeze it with requires_grad_(False)"
            )
        self.device = device
        tensors = parameters + [b for chunk in chunks for b in chunk.buffers()]
        self._on_host = [(tensor, _host_copy(tensor, device)) for tensor in tensors]
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The model computes inside the block."""
        for tensor, host in self._on_host:
            tensor.data = host.to(self.device, copy=True, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for tensor, host in self._on_host:
            tensor.data = host


def _host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    host = tensor.detach().cpu()
    # Pinned memory is copied while the host goes on.
    return host.pin_memory() if device.type == "cuda" else host
