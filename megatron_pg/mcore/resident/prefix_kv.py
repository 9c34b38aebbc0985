"""Keys and values of prefix rows, kept in every layer while other rows attend to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention import ResidentKV
from ...tree import PackedLayout, reached_rows, to_device
from .latent import ResidentLatent

_TOO_EARLY = "a row attends to a resident prefix that has not been encoded yet"


class PrefixKV:
    """What one prefix row left in the attention layers of this rank.

    A call argument like the layout: the row that fills it carries it as
    ``PrefixGroupedSeqParams.prefix_kv``, the rows that attend to it in ``resident``.

    Attributes:
        layout: the prefix row; None before it has been through a layer.
        latents: by layer of latent attention, which keeps those in the place of keys and values.
        states: by layer that carries a state and what it keeps, see ``RowStates``.
    """

    def __init__(self) -> None:
        self.layout: PackedLayout | None = None
        self._layers: dict[torch.nn.Module, ResidentKV] = {}
        self.latents: dict[torch.nn.Module, ResidentLatent] = {}
        self.states: dict[tuple[torch.nn.Module, str], Any] = {}

    def keep(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keep ``key, value`` of a layer; equal tensors come back, to be used by the row itself.

        When the backward pass of the row comes to them, the gradients that other rows have left
        are added to the row's own. Called again for a forward pass that is recomputed, it keeps
        what it has.

        Args:
            layer: the core attention module.
            key: ``[tokens of the prefix row, num_query_groups, head_dim]``, positions encoded.
            value: as key.
            layout: the prefix row.
            window: of the layer, which keeps the last ``window`` tokens of every segment then (see
                ``reached_rows``); all tokens when None.
        """
        self.layout = layout
        rows = None if window is None else _rows(layout, window, key.device)
        if rows is None:
            key, value = _without_owner(key), _without_owner(value)
        kept = self._layers.get(layer)
        if kept is None:
            held = [x.detach() if rows is None else x.detach()[rows] for x in (key, value)]
            kept = self._layers[layer] = ResidentKV(*held)
        joined: tuple[Tensor, Tensor] = _JoinGradients.apply(key, value, kept, rows)
        return joined

    def keep_latent(
        self, layer: torch.nn.Module, query: Tensor, latent: Tensor, shared_key: Tensor
    ) -> Tensor:
        """Keep what a layer of latent attention makes keys and values of (``ResidentLatent``).

        Args:
            layer: the self-attention module.
            query: of the row; an equal tensor comes back, to be used by the row itself.
            latent: see ``ResidentLatent``.
            shared_key: see ``ResidentLatent``.
        """
        kept = self.latents.get(layer)
        if kept is None:
            kept = self.latents[layer] = ResidentLatent(latent, shared_key)
        return kept.join(query, latent, shared_key)

    def latent_of(self, layer: torch.nn.Module) -> ResidentLatent:
        """As ``of``, of latent attention."""
        if layer not in self.latents:
            raise RuntimeError(_TOO_EARLY)
        return self.latents[layer]

    def states_of(self, layer: torch.nn.Module, name: str) -> Any:
        """As ``of``, of layers that carry a state."""
        if (layer, name) not in self.states:
            raise RuntimeError(_TOO_EARLY)
        return self.states[layer, name]

    def of(self, layer: torch.nn.Module) -> ResidentKV:
        """What ``layer`` kept.

        Raises:
            RuntimeError: if the prefix row has not been through the layer.
        """
        if layer not in self._layers:
            raise RuntimeError(_TOO_EARLY)
        return self._layers[layer]

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept and of its gradients so far."""
        others = (*self.latents.values(), *self.states.values())
        kept_bytes: int = sum(kept.num_bytes for kept in others)
        return kept_bytes + sum(
            x.numel() * x.element_size()
            for kept in self._layers.values()
            for x in (kept.k, kept.v, kept.dk, kept.dv)
            if x is not None
        )


def _rows(layout: PackedLayout, window: int, device: torch.device) -> Tensor | None:
    """``reached_rows`` on the device."""

    def make() -> Tensor | None:
        rows = reached_rows(layout, window)
        return None if rows is None else to_device([torch.from_numpy(rows)], device)[0]

    return layout.derived(("reached_rows", window, device), make)


def _without_owner(x: Tensor) -> Tensor:
    """``x``, copied if it alone would keep a larger tensor alive.

    Values are a view of what projects queries, keys and values.
    """
    is_part = x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone(memory_format=torch.contiguous_format) if is_part else x


class _JoinGradients(torch.autograd.Function):
    """Identity whose gradient is its own plus what other rows left in ``kept``, of ``rows``."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, kept: ResidentKV, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.kept, ctx.rows = kept, rows
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.kept
        if kept.dk is None:
            return dkey, dvalue, None, None
        return _joined(dkey, kept.dk, ctx.rows), _joined(dvalue, kept.dv, ctx.rows), None, None


def _joined(own: Tensor, share: Tensor, rows: Tensor | None) -> Tensor:
    """The sum, made in the wider type and rounded once."""
    if rows is None:
        return (share + own).to(own.dtype)
    own = own.clone()
    own[rows] = (share + own[rows]).to(own.dtype)
    return own


@dataclass(frozen=True)
class ScheduledRow:
    """One row on its way through the pipeline: what the iterator gives ``forward_step_func``.

    Attributes:
        row: an entry of ``Wave.prefix_rows`` or of ``Wave.microbatches``.
        prefix_kv: for ``PrefixGroupedSeqParams.from_layout``; None for microbatches.
        resident: for ``PrefixGroupedSeqParams.from_layout``; empty for prefix rows.
    """

    row: Any
    prefix_kv: PrefixKV | None = None
    resident: tuple[PrefixKV, ...] = ()
