"""The output projection's weight, whose gradient goes straight into Megatron's buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def output_weight(weight: Tensor, config: Any, *, is_tied: bool) -> tuple[Tensor, Tensor | None]:
    """The weight as ``vocab_parallel_logprobs`` takes it, and its ``weight_grad``.

    Megatron's ``DistributedDataParallel`` keeps a ``main_grad`` for every parameter and adds what
    autograd found to it. Equals that, but nothing of the weight's size is made and rounded to the
    weight's dtype first. Without such a buffer autograd finds the gradient, as ever.

    Args:
        weight: this rank's shard of the output projection.
        config: the model's ``TransformerConfig``.
        is_tied: whether the embedding, on this same stage, is the same parameter.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not weight.requires_grad or hasattr(weight, "__fsdp_param__"):
        return weight, None
    # The gradient of a tied embedding reaches the hook in any case.
    needs_grad = config.no_sync_func is not None and not is_tied
    view: Tensor = _AddedToMainGrad.apply(weight, needs_grad, config.gradient_accumulation_fusion)
    return view, main_grad


class _AddedToMainGrad(torch.autograd.Function):
    """The weight; in the backward its gradient is in ``main_grad`` already.

    Where gradients are reduced beside the backward, Megatron's hook takes a parameter for ready
    when it has a ``grad``: it gets zeros, which take four bytes, or may leave them alone where all
    that read the weight say that they added to ``main_grad``.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, needs_grad: bool, is_fused: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.needs_grad, ctx.is_fused = weight, needs_grad, is_fused
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None]:
        assert grad is None, "whoever reads the weight adds to main_grad"
        if ctx.needs_grad:
            ctx.weight.grad = ctx.weight.new_zeros(()).expand_as(ctx.weight)
            if ctx.is_fused:
                ctx.weight.grad_added_to_main_grad = True
        return None, None, None
