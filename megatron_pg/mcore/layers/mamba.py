"""Mamba-2 of a layer: a state forked at every branch, everything else as given."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...data import LinearSizes
from ...linear import BatchScan, in_batches, state_space_scan
from ...parallel import ContextPart, ParallelSizes
from ..positioned import PositionedSeqParams
from ..validate import validate_config
from .row import check_row


def check_sizes(config: Any) -> None:
    """Raise ValueError if the ranks cannot divide the heads and groups of Mamba-2 layers."""
    sizes = ParallelSizes.from_config(config)
    linear = LinearSizes.from_config(config, "state_space")
    groups, heads = linear.num_key_heads, linear.num_value_heads
    tp, cp = (
        f"tensor_model_parallel_size={sizes.tp}",
        f"context_parallel_size={sizes.cp}",
    )
    problems = []
    if heads % groups:
        problems.append(f"mamba_num_heads={heads} is no multiple of mamba_num_groups={groups}")
    if heads % (sizes.tp * sizes.cp):
        problems.append(f"mamba_num_heads={heads} is no multiple of {tp} times {cp}")
    own = groups // sizes.tp
    if groups % sizes.tp:
        problems.append(f"mamba_num_groups={groups} is no multiple of {tp}")
    elif own % sizes.cp and sizes.cp % own:
        problems.append(
            f"mamba_num_groups={groups} over {tp} neither divides nor is a multiple of {cp}"
        )
    if problems:
        raise ValueError("; ".join(problems) + "; choose sizes that do")


class PrefixGroupedMamba(torch.nn.Module):
    """Mixin over a ``MambaMixer`` class; ordinary batches go through it untouched.

    Projections, norm and gate run over the row as they are given. Convolution and scan run along
    every path of it (``megatron_pg.linear``): by ``mamba_ssm`` on CUDA, in PyTorch on the CPU.
    Context-parallel ranks exchange tokens for heads before, and back behind.
    """

    config: Any
    in_proj: Any
    out_proj: Any
    norm: Any
    rmsnorm: bool
    # Megatron-Core's slices of its parameters by the heads of context-parallel ranks.
    cp: Any
    activation: str
    d_conv: int
    d_state: int
    headdim: int
    chunk_size: int
    D_has_hdim: bool
    d_inner_local_tp: int
    ngroups_local_tp: int
    nheads_local_tp: int

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        validate_config(config)
        check_sizes(config)
        super().__init__(config, *args, **kwargs)
        if self.D_has_hdim or not self.rmsnorm:
            raise NotImplementedError(
                f"D_has_hdim={self.D_has_hdim}, rmsnorm={self.rmsnorm} of {type(self).__name__}: "
                "packed rows know one skip a head and the gated norm; leave them at their defaults"
            )
        self.num_prefix_grouped_calls = 0
        self.num_ordinary_calls = 0

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """As the given class, along every path of packed groups.

        Raises:
            ValueError: if the row is not the layout's.
            NotImplementedError: with an ``inference_context``.
        """
        if not isinstance(packed_seq_params, PositionedSeqParams):
            self.num_ordinary_calls += 1
            return super().forward(
                hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        context = kwargs.get("inference_context") or next(iter(args), None)
        check_row(self.config, hidden_states, packed_seq_params, inference_context=context)
        self.num_prefix_grouped_calls += 1
        return self._run(hidden_states, packed_seq_params)

    def _run(self, hidden_states: Tensor, params: PositionedSeqParams) -> Any:
        context, row = params.context, params.states(self, self.d_conv)
        own, forks = self._own(context), row.forks
        gate, inputs, steps = self._project(hidden_states, context)
        inputs = row.convolve(inputs, lambda x: self._convolve(x, own))
        wide = torch.promote_types(steps.dtype, torch.float32)
        bias, log_rates, skip = (
            y.to(wide) for y in (own.get_dt_bias(), own.get_A_log(), own.get_D())
        )
        steps = functional.softplus(forks.depth_major(steps).to(wide) + bias)
        x, b, c = self._heads(inputs, own)
        rule = self._kernel if runs_kernels(x) else _torch_rule
        scan: BatchScan = partial(rule, -log_rates.exp(), skip)
        core = forks.packed(row.scan([x, steps, b, c], in_batches(scan)))
        if context is not None:
            core = context.tokens_from_heads(core)
        return self.out_proj(self.norm(core.flatten(1), gate)[:, None])

    def _own(self, context: ContextPart | None) -> Any:
        """Sizes and parameters of the heads that this rank scans, as ``self.cp`` has them.

        Of a row that context-parallel ranks do not divide each scans all.
        """
        if context is not None or self.cp.cp_size == 1:
            return self.cp
        own = copy(self.cp)
        own.cp_size = 1
        own.d_inner_local_tpcp, own.ngroups_local_tpcp = own.d_inner_local_tp, own.ngroups_local_tp
        return own

    def _project(
        self, hidden_states: Tensor, context: ContextPart | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate of this rank's tokens; the convolution's inputs and the steps of all.

        Under context parallelism those of a part of the heads each.
        """
        inner, groups = self.d_inner_local_tp, self.ngroups_local_tp
        state = groups * self.d_state
        projected = self.in_proj(hidden_states)[0].squeeze(1)
        gate, inputs, steps = projected.split([inner, inner + 2 * state, self.nheads_local_tp], -1)
        if context is None:
            return gate, inputs, steps
        x, b, c = inputs.split([inner, state, state], -1)
        copies = max(context.group.size() // groups, 1)
        x, b, c, steps = (
            y.unflatten(-1, (-1, dim))
            for y, dim in ((x, self.headdim), (b, self.d_state), (c, self.d_state), (steps, 1))
        )
        b, c = (y.repeat_interleave(copies, 1) for y in (b, c))
        x, b, c, steps = (y.flatten(1) for y in context.heads_from_tokens(x, b, c, steps))
        return gate, torch.cat([x, b, c], -1), steps

    def _convolve(self, x: Tensor, own: Any) -> Tensor:
        """``[n, channels] -> [n, channels]``, with the activation behind it."""
        weight, bias = own.get_conv1d_weight(), own.get_conv1d_bias()
        columns = x.t()[None].contiguous()
        kernel = _names().get("causal_conv1d_fn") if runs_kernels(x) else None
        if kernel is not None:
            y: Tensor = kernel(columns, weight.squeeze(1), bias, activation=self.activation)
            return y[0].t()
        y = functional.conv1d(columns, weight, bias, padding=self.d_conv - 1, groups=len(weight))
        return functional.silu(y[0, :, : len(x)]).t()

    def _heads(self, inputs: Tensor, own: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``x [tokens, heads, headdim]`` and ``b, c [tokens, groups, d_state]`` of this rank."""
        inner, groups = own.d_inner_local_tpcp, own.ngroups_local_tpcp
        x, b, c = inputs.split([inner, groups * self.d_state, groups * self.d_state], -1)
        b, c = (y.unflatten(-1, (groups, self.d_state)) for y in (b, c))
        # Once for all depths: kernels want it.
        x, b, c = x.unflatten(-1, (-1, self.headdim)).contiguous(), b.contiguous(), c.contiguous()
        return x, b, c

    def _kernel(
        self,
        rates: Tensor,
        skip: Tensor,
        inputs: Sequence[Tensor],
        states: Tensor | None,
        wants_states: bool,
    ) -> tuple[Tensor, Tensor | None]:
        x, steps, b, c = inputs
        # The signature is mamba_ssm's; steps have had their bias and softplus.
        out, final = _names()["mamba_chunk_scan_combined"](
            x,
            steps,
            rates,
            b,
            c,
            self.chunk_size,
            D=skip,
            initial_states=states,
            return_final_states=True,
        )
        return out, final if wants_states else None


def runs_kernels(like: Tensor) -> bool:
    """Whether mamba_ssm and causal_conv1d run where this tensor is."""
    return like.is_cuda


def _names() -> dict[str, Any]:
    """What Megatron-Core has found of mamba_ssm and causal_conv1d."""
    from megatron.core.ssm import mamba_mixer

    names: dict[str, Any] = vars(mamba_mixer)
    return names


def _torch_rule(
    rates: Tensor,
    skip: Tensor,
    inputs: Sequence[Tensor],
    states: Tensor | None,
    wants_states: bool,
) -> tuple[Tensor, Tensor | None]:
    x, steps, b, c = inputs
    out, final = state_space_scan(x, steps, rates, b, c, states)
    return (out + skip[:, None] * x).to(x.dtype), final if wants_states else None


@cache
def prefix_grouped_mamba(cls: type) -> type:
    """Subclass of a ``MambaMixer`` class that forks its state at every branch of a row."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedMamba, cls), {})
