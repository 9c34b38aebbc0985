"""Gated DeltaNet of a layer: a state forked at every branch, everything else as given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.jit import jit_fuser
from megatron.core.ssm import gated_delta_net
from torch import Tensor
from torch.nn import functional

from ...linear import CHUNK_TOKENS, Depth, Scan, in_batches
from ...parallel import ContextPart
from ..positioned import PositionedSeqParams
from ..validate import validate_config
from .row import check_row


class PrefixGroupedLinearAttention(torch.nn.Module):
    """Mixin over a ``GatedDeltaNet`` class; ordinary batches go through it untouched.

    Projections, norm and gate run over the row as they are given. Convolution and scan run along
    every path of it (``megatron_pg.linear``): by the kernels that Megatron-Core has on CUDA, by its
    PyTorch rule under ``deterministic_mode`` and on the CPU. Context-parallel ranks exchange tokens
    for heads before, and back behind.
    """

    config: Any
    in_proj: Any
    out_proj: Any
    conv1d: Any
    act_fn: Any
    activation: str
    A_log: Tensor
    dt_bias: Tensor
    conv_kernel_dim: int
    key_head_dim: int
    value_head_dim: int
    num_key_heads: int
    num_value_heads: int
    tp_size: int
    use_qk_l2norm: bool
    _apply_gated_norm: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        validate_config(config, has_linear_layers=True)
        # Layers hand on what attention takes: of context parallelism, and names.
        taken = signature(super().__init__).parameters
        super().__init__(config, *args, **{k: v for k, v in kwargs.items() if k in taken})
        self.num_prefix_grouped_calls = 0
        self.num_ordinary_calls = 0

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class, along every path of packed groups.

        Raises:
            ValueError: if the row is not the layout's.
            NotImplementedError: with an ``inference_context``; on an ordinary batch under context
                parallelism where the given class knows none.
        """
        if isinstance(packed_seq_params, PositionedSeqParams):
            check_row(self.config, hidden_states, packed_seq_params, **kwargs)
            self.num_prefix_grouped_calls += 1
            return self._run(hidden_states, packed_seq_params)
        if self.config.context_parallel_size > 1 and not hasattr(self, "cp_size"):
            raise NotImplementedError(
                f"an ordinary batch under context parallelism in {type(self).__name__}, whose "
                "Megatron-Core scans the tokens of its own rank alone; feed packed rows"
            )
        self.num_ordinary_calls += 1
        return super().forward(
            hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
        )

    def _run(self, hidden_states: Tensor, params: PositionedSeqParams) -> Any:
        context = params.context
        row = params.states(self, self.conv_kernel_dim)
        forks = row.forks
        qkv, gate, rates = self._project(hidden_states, context)
        qkv = row.convolve(qkv, lambda x: self._convolve(x, context))
        query, key, value = self._heads(qkv)
        decay, beta = self._gates(forks.depth_major(rates), context)
        core = forks.packed(row.scan([query, key, value, decay, beta], self._scan(query)))
        if context is not None:
            core = context.tokens_from_heads(core)
        return self._project_back(core, gate)

    def _project(self, hidden_states: Tensor, context: ContextPart | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of all tokens; the gate of this rank's; beta, alpha of all.

        Under context parallelism of a part of the heads each, but for the gate.
        """
        projected = self.in_proj(hidden_states)[0].squeeze(1)
        qk, values, heads = (n // self.tp_size for n in self._widths)
        if context is None:
            qkv, gate, rates = projected.split([2 * qk + values, values, 2 * heads], -1)
            return qkv, gate, rates
        parts = projected.split([qk, qk, values, values, heads, heads], -1)
        dims = (self.key_head_dim, self.key_head_dim, self.value_head_dim)
        query, key, value, gate, beta, alpha = (
            part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, (*dims, dims[-1], 1, 1))
        )
        query, key, value, beta, alpha = (
            x.flatten(1) for x in context.heads_from_tokens(query, key, value, beta, alpha)
        )
        return torch.cat([query, key, value], 1), gate, torch.cat([beta, alpha], 1)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Of all queries, of all values, and the heads of those."""
        qk = self.num_key_heads * self.key_head_dim
        return qk, self.num_value_heads * self.value_head_dim, self.num_value_heads

    def _convolve(self, x: Tensor, context: ContextPart | None) -> Tensor:
        """``[n, channels] -> [n, channels]``, with the activation behind it."""
        qk, values, _ = (n // self.tp_size for n in self._widths)
        weight, bias = (
            None if p is None else _own(p, [qk, qk, values], context)
            for p in (self.conv1d.weight, self.conv1d.bias)
        )
        assert weight is not None
        kernel = None if self._runs_torch(x) else _convolution_kernel()
        if kernel is not None:
            return kernel(x, weight.squeeze(1), bias, self.activation)
        columns = x.t()[None].contiguous()
        padding = self.conv_kernel_dim - 1
        y = functional.conv1d(columns, weight, bias, padding=padding, groups=len(weight))
        convolved: Tensor = self.act_fn(y[0, :, : len(x)]).t()
        return convolved

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[tokens, value heads, dim]`` as the rule takes them."""
        qk, values, _ = self._widths
        width = qkv.shape[-1]
        qk = width * qk // (2 * qk + values)
        both, value = qkv.split([2 * qk, width - 2 * qk], -1)
        both = both.unflatten(-1, (-1, self.key_head_dim))
        if self.use_qk_l2norm:
            both = gated_delta_net.l2norm(both.contiguous())
        query, key = both.chunk(2, 1)
        repeats = self.num_value_heads // self.num_key_heads
        if repeats > 1:
            query, key = (x.repeat_interleave(repeats, 1) for x in (query, key))
        query, key = query.contiguous(), key.contiguous()
        return query, key, value.unflatten(-1, (-1, self.value_head_dim)).contiguous()

    def _gates(self, rates: Tensor, context: ContextPart | None) -> tuple[Tensor, Tensor]:
        """Logarithms of the decays, in fp32, and how much of every value is written.

        Of ``[tokens, 2 * value heads]``: beta, and alpha.
        """
        heads = [len(self.A_log)]
        own = _own(self.A_log, heads, context), _own(self.dt_bias, heads, context)
        beta, alpha = rates.chunk(2, -1)
        return (_fused_gates if rates.is_cuda else gates)(alpha, beta, *own)

    def _scan(self, like: Tensor) -> Scan:
        if self._runs_torch(like):
            return in_batches(_torch_rule)
        return _kernel_rule

    def _runs_torch(self, like: Tensor) -> bool:
        return bool(self.config.deterministic_mode) or not like.is_cuda

    def _project_back(self, core: Tensor, gate: Tensor) -> Any:
        """Norm, gate and output projection, of this rank's tokens."""

        def normed(core: Tensor, gate: Tensor) -> Tensor:
            y: Tensor = self._apply_gated_norm(core, gate.reshape(core.shape))
            return y.reshape(len(core), 1, -1)

        if not getattr(self, "recompute_norm_out", False):
            return self.out_proj(normed(core, gate))
        checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=self.config.fp8)
        out, bias = self.out_proj(checkpoint.checkpoint(normed, core, gate))
        checkpoint.discard_output_and_register_recompute(out)
        return out, bias


def gates(alpha: Tensor, beta: Tensor, log_rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the decays, in fp32 or wider, and how much of every value is written.

    Args:
        alpha: ``[tokens, heads]``.
        beta: as alpha.
        log_rate: ``[heads]``.
        bias: ``[heads]``.
    """
    wide = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    # Of a 16-bit logarithm the rate itself would lose three more bits, and so every decay.
    rate = log_rate.to(wide.dtype).exp()
    return -rate * functional.softplus(wide + bias), beta.sigmoid()


# Eight kernels otherwise.
_fused_gates = jit_fuser(gates)


def _own(parameter: Tensor, sections: Sequence[int], context: ContextPart | None) -> Tensor:
    """The part of every section of a parameter that belongs to this rank's heads."""
    if context is None:
        return parameter
    return torch.cat([part[context.heads(len(part))] for part in parameter.split(list(sections))])


Convolution = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]


def _convolution_kernel() -> Convolution | None:
    """``x [n, channels], weight, bias, activation``; of FLA since core 0.18, else the package's."""
    names = vars(gated_delta_net)
    if (varlen := names.get("causal_conv1d")) is not None:
        return lambda x, weight, bias, activation: varlen(
            x=x[None], weight=weight, bias=bias, activation=activation
        )[0].squeeze(0)
    if (columns := names.get("causal_conv1d_fn")) is not None:
        return lambda x, weight, bias, activation: (
            columns(x=x.t()[None].contiguous(), weight=weight, bias=bias, activation=activation)
            .squeeze(0)
            .t()
        )
    return None


def _torch_rule(
    inputs: Sequence[Tensor], states: Tensor | None, wants_states: bool
) -> tuple[Tensor, Tensor | None]:
    query, key, value, decay, beta = inputs
    made: tuple[Tensor, Tensor | None] = gated_delta_net.torch_chunk_gated_delta_rule(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        # It goes through a chunk token by token, padded ones too.
        chunk_size=min(query.shape[1], CHUNK_TOKENS),
        initial_state=states,
        output_final_state=wants_states,
    )
    return made


def _kernel_rule(
    depth: Depth, inputs: Sequence[Tensor], states: Tensor | None, wants_states: bool
) -> tuple[Tensor, Tensor | None]:
    query, key, value, decay, beta = (x[None] for x in inputs)
    rule = gated_delta_net.chunk_gated_delta_rule
    # Older ones make them of cu_seqlens, for which the host waits.
    chunks = {"chunk_indices": depth.chunks} if _takes_chunks(rule) else {}
    out, final = rule(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=states,
        output_final_state=wants_states,
        cu_seqlens=depth.cu_seqlens,
        **chunks,
    )
    return out.squeeze(0), final


@cache
def _takes_chunks(rule: Callable[..., Any]) -> bool:
    return "chunk_indices" in signature(rule).parameters


@cache
def prefix_grouped_linear_attention(cls: type) -> type:
    """Subclass of a ``GatedDeltaNet`` class that forks its state at every branch of a row."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedLinearAttention, cls), {})
