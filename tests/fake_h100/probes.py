"""One thing of each kind that a function may do on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.fake_h100.device import FakeH100, compiled_is_one_kernel
from tests.fake_h100.record import Record

CUDA = torch.device("cuda", 0)


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, device=CUDA, dtype=dtype)


def forward_and_backward() -> None:
    weight = on_device(4, 4).requires_grad_()
    (weight @ on_device(4, 2)).sum().backward()
    assert weight.grad is not None and weight.grad.device == CUDA


def event() -> None:
    mark = torch.cuda.Event()
    mark.record()
    mark.synchronize()


def compiled() -> None:
    with compiled_is_one_kernel():
        fused = torch.compile(lambda x: (x + 1) * 2 - x)
    fused(on_device(4))


def launch(*arguments: Any, **constants: Any) -> None:
    from tests.fake_h100.kernels import double

    double[(1,)](*arguments, **constants, num_warps=2)


def moved_module() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.weight.is_special = True
    layer.cuda()
    assert layer.weight.is_cuda and layer.weight.is_special
    assert layer.bfloat16().bias.dtype == torch.bfloat16


PROBES: dict[str, Callable[[], Any]] = {
    "views": lambda: on_device(4, 4)[1:].t().t()[0],
    "matrix product": forward_and_backward,
    "on the host": lambda: torch.arange(9).sum().item(),
    "a number": lambda: on_device(4) + torch.tensor(3.0),
    "pinned": lambda: torch.arange(9).pin_memory().to(CUDA, non_blocking=True),
    "slice of pinned": lambda: torch.arange(9).pin_memory()[2:5].to(CUDA, non_blocking=True),
    "pinned, waits": lambda: torch.arange(9).pin_memory().to(CUDA),
    "pageable": lambda: torch.arange(9).to(CUDA, non_blocking=True),
    "pageable, waits": lambda: torch.arange(9).to(CUDA),
    "copy_": lambda: on_device(9).copy_(torch.zeros(9), non_blocking=True),
    "a scalar": lambda: torch.tensor(3).to(CUDA, non_blocking=True),
    "numbers": lambda: torch.tensor([3, 4], device=CUDA),
    "indices of the host": lambda: on_device(9)[torch.tensor([1, 2])],
    "cpu": lambda: on_device(9).cpu(),
    "cpu, later": lambda: on_device(9).to("cpu", non_blocking=True),
    "copy_ to the host": lambda: torch.zeros(9).copy_(on_device(9)),
    "item": lambda: on_device(()).item(),
    "bool": lambda: bool(on_device(1)),
    "tolist": lambda: on_device(9).tolist(),
    "device": lambda: torch.cuda.synchronize(),
    "stream": lambda: torch.cuda.current_stream().synchronize(),
    "event": event,
    "compiled": compiled,
    "triton": lambda: launch(on_device(9), on_device(9), 9, BLOCK=16),
    "module": moved_module,
}
# What goes wrong on a device goes wrong here.
MISTAKES: dict[str, Callable[[], Any]] = {
    "two devices": lambda: on_device(4) + torch.zeros(4),
    "shapes": lambda: on_device(4, 4) @ on_device(3, 4),
    "two dtypes": lambda: on_device(4, 4) @ on_device(4, 4, dtype=torch.bfloat16),
    "triton on the host": lambda: launch(torch.zeros(9), on_device(9), 9, BLOCK=16),
    "triton without an argument": lambda: launch(on_device(9), on_device(9), BLOCK=16),
    "unknown shape": lambda: on_device(9).nonzero(),
}


def records() -> dict[str, Record]:
    """What each probe does."""
    with FakeH100() as device:
        found = {name: device.record(probe) for name, probe in PROBES.items()}
        assert device.record(lambda: device.record(forward_and_backward)) == Record()
    return found


def errors() -> dict[str, str]:
    """What each mistake raises."""
    found = {}
    with FakeH100():
        for name, probe in MISTAKES.items():
            try:
                probe()
            except Exception as error:
                found[name] = type(error).__name__
    return found


def device_name() -> tuple[str, tuple[int, int], bool]:
    """What PyTorch finds."""
    is_there = torch.cuda.is_available()
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability(), is_there
