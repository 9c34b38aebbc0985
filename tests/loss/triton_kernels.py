"""The Triton kernels of the vocabulary head, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


def load_kernels(device: str) -> ModuleType:
    """A copy of the module for the device: Triton decides when it decorates the kernels."""
    spec = importlib.util.find_spec("megatron_pg.loss.kernels.logits_triton")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if device == "cpu" else "0")
        spec.loader.exec_module(module)
    kind = type(module._gradient_kernel).__name__
    assert kind == ("InterpretedFunction" if device == "cpu" else "JITFunction")
    return module


@contextmanager
def kernels_on(device: str) -> Iterator[ModuleType]:
    """The module for the device; within, the interpreter knows Triton's reductions.

    They are kernels themselves, which Triton decorated for a GPU when it was imported.
    """
    import triton.language as tl

    def sum_of(input: Any, axis: int) -> Any:
        return tl.reduce(input, axis, tl.standard._sum_combine)

    def max_of(input: Any, axis: int) -> Any:
        return tl.reduce(input, axis, tl.standard._elementwise_max)

    module = load_kernels(device)
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(tl, "sum", sum_of)
            patch.setattr(tl, "max", max_of)
        yield module
