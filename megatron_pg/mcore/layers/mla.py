"""Latent self-attention of a layer: positions by the layout, everything else as given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor

from ..positioned import PositionedSeqParams, WrappedRow
from ..resident import PrefixKV, ProjectedKV
from .self_attention import PrefixGroupedSelfAttention


@dataclass(frozen=True)
class LatentRow(WrappedRow):
    """A row as wrapped latent attention hands it to itself: ``[T, heads, dim]``.

    Attributes:
        layer: that does.
    """

    layer: Any = None
    local_cp_size: None = None

    def attend(self, core: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See the base; prefix rows keep latents in the place of keys and values."""
        params: Any = self.params
        resident = getattr(params, "resident", ())
        if not resident and self.prefix_kv is None:
            return super().attend(core, query, key, value)
        made = [ProjectedKV(kept.latent_of(self.layer), self._project) for kept in resident]
        if torch.is_grad_enabled() and key.requires_grad:
            for projected in made:
                key = projected.follow(key)

        def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
            out: Tensor = core.attend(query, key, value, params.layout, made, heads)
            return out

        out: Tensor = params.on_whole_row(attend, query, key, value)
        if not self.layer.recomputes_attention:
            for projected in made:
                projected.drop()
        return out

    def _project(self, latent: Tensor, shared_key: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of a prefix row as this rank attends to them."""
        made: tuple[Tensor, ...] = self.layer.project(latent, shared_key)
        context = getattr(self.params, "context", None)
        return made if context is None else context.heads_from_tokens(*made)

    @property
    def prefix_kv(self) -> PrefixKV | None:
        """What keeps the row, if it is a prefix row."""
        return getattr(self.params, "prefix_kv", None)

    @property
    def max_seqlen_q(self) -> int:
        """Bound of the row's positions."""
        return int(self.params.max_seqlen_q)

    @property
    def max_seqlen_kv(self) -> int:
        """As of queries."""
        return int(self.params.max_seqlen_kv)


class PrefixGroupedLatentAttention(PrefixGroupedSelfAttention):
    """Mixin over an ``MLASelfAttention`` class; ordinary batches go through it untouched.

    Latent attention has a rotary embedding of its own, which is asked for a length and makes a row
    for each position below it. Here it gives the rows of the tokens' positions.
    """

    rotary_pos_emb: Any
    linear_kv_up_proj: Any
    num_attention_heads_per_partition: int
    checkpoint_core_attention: bool

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # Once it is there: Megatron's own constructor reads attributes of its method.
        given: type = type(self.rotary_pos_emb)
        self.rotary_pos_emb.__class__ = _positioned_rotary(given)

    def wrapped_row(self, params: PositionedSeqParams) -> LatentRow:
        """See the base."""
        return LatentRow(params, layer=self)

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class; a prefix row leaves its latents."""
        query, key, value, q_latent, latent = super().get_query_key_value_tensors(  # type: ignore[misc]
            hidden_states, key_value_states, position_ids, packed_seq_params, **kwargs
        )
        if isinstance(packed_seq_params, LatentRow) and packed_seq_params.prefix_kv is not None:
            shared_key = key[:, 0, -self.config.qk_pos_emb_head_dim :]
            query = packed_seq_params.prefix_kv.keep_latent(self, query, latent, shared_key)
        return query, key, value, q_latent, latent

    def project(self, latent: Tensor, shared_key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[tokens, heads, head_dim]`` and values of what a ``ResidentLatent`` keeps."""
        value_dim, heads = self.config.v_head_dim, self.num_attention_heads_per_partition
        both = self.linear_kv_up_proj(latent)[0].unflatten(-1, (heads, -1))
        own, value = both.split([both.shape[-1] - value_dim, value_dim], dim=-1)
        key = torch.cat([own, shared_key[:, None].expand(-1, heads, -1)], dim=-1)
        return key, value.contiguous()

    @property
    def recomputes_attention(self) -> bool:
        """Whether the backward pass follows each forward pass that has a graph at once."""
        return self.config.recompute_granularity == "full" or self.checkpoint_core_attention


@cache
def prefix_grouped_latent_attention(cls: type) -> type:
    """Subclass of an ``MLASelfAttention`` class that places packed groups by their layout."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedLatentAttention, cls), {})


class _LengthOfRow(int):
    """A rotary length on its way from ``get_rotary_seq_len`` to ``forward``, with its row."""

    params: PositionedSeqParams

    @classmethod
    def of(cls, params: PositionedSeqParams) -> Self:
        length = cls(params.max_seqlen_q)
        length.params = params
        return length


@cache
def _positioned_rotary(cls: Any) -> type:
    """Subclass of a rotary embedding, with the same state, that knows packed rows."""

    def get_rotary_seq_len(
        self: Any,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> int:
        if isinstance(packed_seq_params, WrappedRow):
            return _LengthOfRow.of(packed_seq_params.params)
        length: int = cls.get_rotary_seq_len(
            self,
            inference_context,
            transformer,
            transformer_input,
            transformer_config,
            packed_seq_params,
            **kwargs,
        )
        return length

    def forward(self: Any, max_seq_len: int, *args: Any, **kwargs: Any) -> Any:
        if isinstance(max_seq_len, _LengthOfRow):
            # Of a packed row no context-parallel rank's part is cut out: its rows are gathered.
            kwargs["packed_seq"] = True
        made = cls.forward(self, int(max_seq_len), *args, **kwargs)
        if not isinstance(max_seq_len, _LengthOfRow):
            return made
        # YaRN's comes with the factor on its sines and cosines.
        table, *mscale = made if isinstance(made, tuple) else (made,)
        # A packed row has lost its batch dimension: [T, heads, dim] takes [T, 1, dim].
        rows: Tensor = max_seq_len.params.gather_rotary(table).squeeze(1)
        return (rows, *mscale) if mscale else rows

    methods = {"get_rotary_seq_len": get_rotary_seq_len, "forward": forward}
    return type(f"Positioned{cls.__name__}", (cls,), methods)


@cache
def latent_core_attention(cls: Any) -> type:
    """A core attention class that takes the sizes of latent attention's heads.

    ``DotProductAttention`` computes with values of any size, but neither takes the sizes nor
    shapes its output by them: latent attention of the local spec does not build. The class itself
    comes back if it takes them.
    """
    if _takes_channels(cls):
        return cls  # type: ignore[no-any-return]
    return type(f"Latent{cls.__name__}", (_TakesChannels, cls), {})


def _takes_channels(cls: type) -> bool:
    """Whether a constructor takes the sizes; one that hands on all keywords takes what is above."""
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        taken = signature(base.__init__).parameters  # type: ignore[misc]
        if "v_channels" in taken:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            return False
    return False


class _TakesChannels:
    """Mixin over ``DotProductAttention``."""

    hidden_size_per_partition: int
    num_attention_heads_per_partition: int

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Megatron-Core's Attention makes one without sizes first, which is thrown away.
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
