"""Arrays of the host on their way to the device, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Wide enough for every dtype, and for vector loads.
_ALIGNMENT = 16


def to_device(arrays: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """The same arrays on the device, in one copy that the host does not wait for.

    They are laid side by side in one buffer, pinned for CUDA: a copy from ordinary memory is not
    asynchronous there, whatever it is told. What comes back are views of one allocation, which
    lives as long as any of them. Arrays that are there already, as all are on the CPU, come back
    themselves.

    Args:
        arrays: of any shapes and dtypes.
        device: where to.
    """
    moved = list(arrays)
    places = [i for i, x in enumerate(arrays) if x.device != device and x.numel()]
    ends = [0]
    for i in places:
        ends.append(-(-(ends[-1] + arrays[i].nbytes) // _ALIGNMENT) * _ALIGNMENT)
    if places:
        buffer = _host_buffer(ends[-1], device)
        for i, start in zip(places, ends):
            _view(buffer, start, arrays[i]).copy_(arrays[i])
        there = buffer.to(device, non_blocking=True)
        for i, start in zip(places, ends):
            moved[i] = _view(there, start, arrays[i])
    return tuple(
        x if x.numel() else torch.empty(x.shape, dtype=x.dtype, device=device) for x in moved
    )


def _host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    # PyTorch reuses pinned memory once the copies from it are done.
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
