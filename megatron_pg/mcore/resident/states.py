"""What layers that carry a state keep of a prefix row: final states and last inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention import accumulation_dtype
from ...linear import (
    Continued,
    Forks,
    Scan,
    Tails,
    continued,
    forked_convolution,
    forked_scan,
    tails_of,
)
from ...tree import PackedLayout
from .prefix_kv import PrefixKV


@dataclass(eq=False)
class KeptRows:
    """A row of numbers for every segment of a prefix row, and the gradients that others leave.

    Attributes:
        value: ``[segments, ...]`` in depth-major order; no graph.
        grad: of it so far, fp32 for 16-bit types; None before the first share.
    """

    value: Tensor
    grad: Tensor | None = None

    def add(self, segments: Tensor, shares: Tensor) -> None:
        """Add what another row's backward pass gives to these segments, each named once."""
        if self.grad is None:
            self.grad = torch.zeros_like(self.value, dtype=accumulation_dtype(self.value.dtype))
        self.grad.index_add_(0, segments, shares.to(self.grad.dtype))

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        held = (self.value, self.grad)
        return sum(x.numel() * x.element_size() for x in held if x is not None)


@dataclass(frozen=True, eq=False)
class RowStates:
    """``StatesOfRow`` of a row that continues prefix rows, or is one.

    Attributes:
        layer: the module.
        layout: of the row.
        forks: of the row, for the layer's convolution.
        prefix_kv: keeps the row, when it is a prefix row.
        resident: kept by the prefix rows that the row continues.
    """

    layer: torch.nn.Module
    layout: PackedLayout
    forks: Forks
    prefix_kv: PrefixKV | None = None
    resident: tuple[PrefixKV, ...] = ()

    def convolve(self, x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """See ``StatesOfRow``."""
        history = self._history("inputs", [x])
        if self.prefix_kv is not None:
            tails = tails_of(self.layout, self.forks.width, x.device)
            kept = self._keep("inputs", lambda: tails.take(x.detach()))
            x = _JoinTails.apply(x, tails, kept)
        return forked_convolution(x, self.forks, convolve, history)

    def scan(self, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """See ``StatesOfRow``."""
        # Decays may be of parameters that are no inputs.
        made_of = [*inputs, *self.layer.parameters()]
        history, keeps = self._history("states", made_of), self.prefix_kv is not None
        scanned = forked_scan(inputs, self.forks, scan, history, keeps)
        if scanned.states is None:
            return scanned.out
        states = scanned.states
        out: Tensor = _JoinStates.apply(scanned.out, states, self._keep("states", states.detach))
        return out

    def _keep(self, name: str, make: Callable[[], Tensor]) -> KeptRows:
        """What stays; a forward pass that is recomputed finds what it had kept."""
        assert self.prefix_kv is not None
        self.prefix_kv.layout = self.layout
        key = self.layer, name
        kept: KeptRows | None = self.prefix_kv.states.get(key)
        if kept is None:
            kept = self.prefix_kv.states[key] = KeptRows(make())
        return kept

    def _history(self, name: str, made_of: Sequence[Tensor]) -> Tensor | None:
        """``[roots, ...]`` of what roots continue, zeros for those that begin."""
        if not self.resident:
            return None
        kept = [row.states_of(self.layer, name) for row in self.resident]
        layouts = [row.layout for row in self.resident if row.layout is not None]
        places = continued(self.layout, self.forks, layouts)
        if not places:
            return None
        # Its gradient is wanted where that of what the layer makes of it is.
        follow = next((x for x in made_of if x.requires_grad), made_of[0])
        history: Tensor = _Continue.apply(follow, kept, places, len(self.forks.roots))
        return history


class _Continue(torch.autograd.Function):
    """Kept rows by root; their gradients go to what is kept, as sums over the roots."""

    @staticmethod
    def forward(
        ctx: Any,
        follow: Tensor,
        kept: Sequence[KeptRows],
        places: Sequence[Continued],
        num_roots: int,
    ) -> Tensor:
        ctx.kept, ctx.places = kept, places
        value = kept[places[0].row].value
        # Wide, so that gradients are not rounded before they are added up.
        out = value.new_zeros(num_roots, *value.shape[1:], dtype=accumulation_dtype(value.dtype))
        for of in places:
            rows = kept[of.row].value.index_select(0, of.segments.rows)
            out.index_copy_(0, of.roots, rows.to(out.dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        for of in ctx.places:
            sums = of.segments.sums(grad.index_select(0, of.roots))
            ctx.kept[of.row].add(of.segments.sources, sums)
        return None, None, None, None


class _JoinTails(torch.autograd.Function):
    """Identity whose gradient is its own plus what other rows left for its last inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tails: Tails, kept: KeptRows) -> Tensor:
        ctx.tails, ctx.kept = tails, kept
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        share = ctx.kept.grad
        return dx if share is None else ctx.tails.add(dx, share), None, None


class _JoinStates(torch.autograd.Function):
    """The outputs of a prefix row; its final states get the gradients that other rows left."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, states: Tensor, kept: KeptRows) -> Tensor:
        ctx.kept, ctx.dtype = kept, states.dtype
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        share = ctx.kept.grad
        return dout, None if share is None else share.to(ctx.dtype), None
