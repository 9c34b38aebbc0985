"""A Triton kernel to be launched on the fake device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(out_ptr: tl.tensor, x_ptr: tl.tensor, num: tl.tensor, BLOCK: tl.constexpr) -> None:
    """``out = 2 * x``."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num
    tl.store(out_ptr + index, 2 * tl.load(x_ptr + index, mask=inside), mask=inside)
