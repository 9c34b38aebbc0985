"""Linear layers whose output is normalised, or may be changed, before another takes it."""

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


class _ExpertOutput(torch.nn.Module):
    """Mixin over the last linear layer of a local expert with biases.

    An expert adds its bias to the output in place, which autograd forbids where the output is a
    view that a function has made. And the bias has met all tokens of its expert: summing its
    gradient over ranks, as of what sees a part of a sequence, would add up different experts; as
    a copy of the first rank's it would be missing in the gradients' norm.
    """

    bias: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias.sequence_parallel = False
        self.bias.tensor_model_parallel = True

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """What the given class computes, in memory of its own."""
        output, bias = super().forward(*args, **kwargs)
        return output.clone(), bias


@cache
def expert_output_linear(cls: type) -> type:
    """Subclass of the last linear layer of an expert with biases, which can be trained."""
    return type(f"{cls.__name__}ExpertOutput", (_ExpertOutput, cls), {})
