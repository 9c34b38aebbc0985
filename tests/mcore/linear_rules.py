"""Linear attention where fp64 is compared: nothing is cast."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.ssm import gated_delta_net


@contextmanager
def in_fp64() -> Iterator[None]:
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
