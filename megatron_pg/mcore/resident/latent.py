"""What latent attention keeps of a prefix row, and keys and values made of it when they are read.

Keys and values of a token are many times what they are made of: 40,960 numbers to 576 with 128
heads of 192 and 128. So a layer keeps the latent and the key part that heads share, as they come
out of the prefix row; every row that attends to them projects them once in its forward pass and
once in its backward pass, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...attention import ResidentKV, accumulation_dtype


class ResidentLatent:
    """Latents of one prefix row in one layer, and the gradients that other rows leave.

    Attributes:
        latent: ``[tokens of the row, kv_lora_rank]``, those of this rank under sequence
            parallelism, as ``linear_kv_up_proj`` takes them; no graph.
        shared_key: ``[tokens of the row, qk_pos_emb_head_dim]``, positions encoded; no graph.
        gradients: of both so far, fp32 for 16-bit types; None before the first share.
    """

    def __init__(self, latent: Tensor, shared_key: Tensor) -> None:
        is_whole = latent.untyped_storage().nbytes() == latent.numel() * latent.element_size()
        self.latent = latent.detach() if is_whole else latent.detach().clone()
        # Part of all heads' keys, whose memory recompute of their projection frees.
        self.shared_key = shared_key.detach().clone()
        self.gradients: tuple[Tensor, Tensor] | None = None

    def add(self, *shares: Tensor) -> None:
        """Add what a row's backward pass gives to both."""
        if self.gradients is None:
            wide = accumulation_dtype(self.latent.dtype)
            self.gradients = (
                torch.zeros_like(self.latent, dtype=wide),
                torch.zeros_like(self.shared_key, dtype=wide),
            )
        for total, share in zip(self.gradients, shares):
            total += share

    @property
    def num_bytes(self) -> int:
        """Memory of both and of their gradients so far."""
        held = (self.latent, self.shared_key, *(self.gradients or ()))
        return sum(x.numel() * x.element_size() for x in held)

    def join(self, query: Tensor, latent: Tensor, shared_key: Tensor) -> Tensor:
        """``query``, for the prefix row itself.

        When its backward pass comes to it, what other rows have left is added to the gradients of
        the row's own ``latent`` and ``shared_key``.
        """
        joined: Tensor = _AddShares.apply(query, latent, shared_key, self)
        return joined


class ProjectedKV(ResidentKV):
    """Keys and values of a ``ResidentLatent``, made when they are read.

    Args:
        kept: of the prefix row.
        project: keys and values of its latent and shared key, in the layer of this call.
    """

    def __init__(
        self, kept: ResidentLatent, project: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> None:
        self._kept, self._project = kept, project
        self._leaves: tuple[Tensor, ...] = ()
        self._made: tuple[Tensor, ...] = ()
        self.dk = self.dv = None

    @property
    def k(self) -> Tensor:  # type: ignore[override]
        """See the base."""
        return self._read()[0].detach()

    @property
    def v(self) -> Tensor:  # type: ignore[override]
        """See the base."""
        return self._read()[1].detach()

    def _read(self) -> tuple[Tensor, ...]:
        if not self._made:
            # With a graph, which a forward pass drops and a backward pass runs back through.
            with torch.enable_grad():
                kept = self._kept.latent, self._kept.shared_key
                self._leaves = tuple(x.detach().requires_grad_() for x in kept)
                self._made = self._project(*self._leaves)
        return self._made

    def drop(self) -> None:
        """Forget keys and values until they are read again."""
        self._leaves = self._made = ()

    def follow(self, key: Tensor) -> Tensor:
        """``key`` of the row that attends to them.

        Its gradient needs that of attention, which leaves ``dk`` and ``dv``; those then go on to
        the projection's weights and to the kept latent.
        """
        followed: Tensor = _GoOn.apply(key, self)
        return followed

    def _go_on(self) -> None:
        if self.dk is None or self.dv is None:
            return
        made, leaves = self._read(), self._leaves
        shares = [grad.to(x.dtype) for grad, x in zip((self.dk, self.dv), made)]
        torch.autograd.backward(made, shares)
        self._kept.add(*(x.grad for x in leaves if x.grad is not None))
        self.dk = self.dv = None
        self.drop()


class _AddShares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, latent: Tensor, shared_key: Tensor, kept: ResidentLatent
    ) -> Tensor:
        ctx.kept, ctx.dtype = kept, latent.dtype
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.kept.gradients is None:
            return dquery, None, None, None
        return dquery, *(x.to(ctx.dtype) for x in ctx.kept.gradients), None


class _GoOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, projected: ProjectedKV) -> Tensor:
        ctx.projected = projected
        return key.view_as(key)

    @staticmethod
    def backward(ctx: Any, dkey: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.projected._go_on()
        return dkey, None
