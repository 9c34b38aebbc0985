"""Linear attention on the CPU: nothing is compiled, and nothing cast where fp64 is compared."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from megatron.core.ssm import gated_delta_net


@contextmanager
def uncompiled(in_fp64: bool) -> Iterator[None]:
    """Megatron-Core's layer as it is written; compiling its gated norm takes long."""
    with torch.compiler.set_stance("force_eager"), _in_fp64() if in_fp64 else nullcontext():
        yield


@contextmanager
def _in_fp64() -> Iterator[None]:
    """Megatron-Core's rule, gates and gated norm without their casts to fp32.

    Packed and written out round alike there, but not to more than seven digits.
    """
    rule = gated_delta_net.torch_chunk_gated_delta_rule
    source = inspect.getsource(rule)
    assert "torch.float32" in source
    scope: dict[str, Any] = dict(vars(sys.modules[rule.__module__]))
    exec(source.replace("torch.float32", "torch.float64"), scope)
    exact = scope[rule.__name__]
    package = gated_delta_net.__name__
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            is_ours = name == package or name.startswith(f"{package}.")
            if is_ours and hasattr(module, rule.__name__):
                stack.enter_context(mock.patch.object(module, rule.__name__, exact))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield
