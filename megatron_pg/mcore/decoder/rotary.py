"""Two rotary tables: of all tokens, and of those in layers with a window."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


class RotaryOfWindows(torch.nn.Module):
    """Rotary embedding whose tables have that of windows behind that of other layers.

    One table goes to every layer, so they lie side by side in its last dimension, and each layer
    takes its half (``rotary_by_window``).

    Args:
        of_all: Megatron's rotary embedding of layers without a window.
        of_windows: of layers with one, not scaled.
    """

    def __init__(self, of_all: Any, of_windows: Any) -> None:
        super().__init__()
        self.of_all, self.of_windows = of_all, of_windows
        self.seq_len_interpolation_factor = of_all.seq_len_interpolation_factor

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """See ``RotaryEmbedding``."""
        length: int = self.of_all.get_rotary_seq_len(*args, **kwargs)
        return length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``[positions, 1, 1, 2 * width]``, and what else YaRN returns."""
        given, windows = self.of_all(*args, **kwargs), self.of_windows(*args, **kwargs)
        table, *more = given if isinstance(given, tuple) else (given,)
        joined = torch.cat((table, windows), -1)
        return (joined, *more) if more else joined


class RotaryByWindow(torch.nn.Module):
    """Mixin over a ``SelfAttention`` class: it takes its half of the table."""

    config: Any

    def __init__(self, config: Any, *args: Any, layer_number: int, **kwargs: Any) -> None:
        self.has_window = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        if self.has_window:
            # Megatron-Core scales cosine and sine by what the configuration says of YaRN.
            config = copy.copy(config)
            config.yarn_rotary_scaling_factor = 1.0
        super().__init__(config, *args, layer_number=layer_number, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb.chunk(2, -1)[int(self.has_window)]
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)


@cache
def rotary_by_window(cls: type) -> type:
    """Subclass of a ``SelfAttention`` class that takes its half of a ``RotaryOfWindows``."""
    return type(f"{cls.__name__}RotaryByWindow", (RotaryByWindow, cls), {})
