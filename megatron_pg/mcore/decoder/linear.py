"""A linear layer whose output is normalised before the residual stream takes it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PostLayerNorm(torch.nn.Module):
    """Mixin over a linear layer that returns its output and a bias to add.

    Parameters of the norm are named ``post_layernorm``, as Megatron Bridge names them.
    """

    norm_class: type

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *args: Any,
        config: TransformerConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = self.norm_class(
            config=config, hidden_size=output_size, eps=config.layernorm_epsilon
        )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The norm of what the given class computes, its bias included."""
        output, bias = super().forward(*args, **kwargs)
        return self.post_layernorm(output if bias is None else output + bias), None


@cache
def post_layernorm_linear(cls: type, norm_class: type) -> type:
    """Subclass of a linear layer that normalises its output."""
    return type(f"{cls.__name__}PostLayerNorm", (PostLayerNorm, cls), {"norm_class": norm_class})
