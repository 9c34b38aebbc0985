"""The recurrence of state-space layers (Mamba-2) over batches of sequences, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .depths import CHUNK_TOKENS


def state_space_scan(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """The recurrence of every sequence and head, from its state of ``states``.

    Equals, token after token::

        state = exp(dt * rate) * state + dt * outer(x, b)
        out = state @ c

    A token with ``dt`` 0 leaves the state as it is. Computed in runs of ``chunk_tokens``, within
    which all tokens see each other at once, in fp32 or wider, under ``torch.autocast`` too; of
    shorter sequences in one run.

    Args:
        x: ``[sequences, tokens, heads, head_dim]``.
        dt: ``[sequences, tokens, heads]`` step sizes, from 0.
        rates: ``[heads]``, below 0.
        b: ``[sequences, tokens, groups, state_dim]``; a group is for ``heads / groups`` heads.
        c: as ``b``.
        states: ``[sequences, heads, head_dim, state_dim]`` before the first token; None for zeros.
        chunk_tokens: of a run.

    Returns:
        ``out`` as ``x``, in its dtype, and the states behind the last token, in fp32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    before = None if states is None else states.to(wide)
    inputs = [_chunks(y.to(wide), min(chunk_tokens, x.shape[1])) for y in (x, dt, b, c)]
    with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
        out, state = _scan(inputs, rates.to(wide), before)
    return out[:, : x.shape[1]].to(x.dtype), state


def _scan(inputs: Sequence[Tensor], rates: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of ``x, dt, b, c`` in whole chunks ``[sequences, chunks, tokens, ...]``."""
    x, dt, b, c = inputs
    heads, groups = x.shape[3], b.shape[3]
    # Heads before tokens, those of a group side by side.
    written = (x * dt[..., None]).transpose(2, 3)  # [sequences, chunks, heads, tokens, head_dim]
    total = (dt * rates).cumsum(2).transpose(2, 3)  # [sequences, chunks, heads, tokens]
    b, c = (y.transpose(2, 3).repeat_interleave(heads // groups, 2) for y in (b, c))

    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    # Masked before the exponential, which overflows where a token is read before it is written.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    out = ((c @ b.transpose(-1, -2)) * decay) @ written

    ends = total[..., -1:]
    added = (written * (ends - total).exp()[..., None]).transpose(-1, -2) @ b
    kept = ends.exp()[..., None]
    state = torch.zeros_like(added[:, 0]) if states is None else states
    before = []
    for i in range(added.shape[1]):
        before.append(state)
        state = kept[:, i] * state + added[:, i]
    out = out + (c * total.exp()[..., None]) @ torch.stack(before, 1).transpose(-1, -2)
    return out.transpose(2, 3).flatten(1, 2), state


def _chunks(x: Tensor, length: int) -> Tensor:
    """``[sequences, chunks, length, ...]`` of ``[sequences, tokens, ...]``, zeros at the end."""
    missing = -x.shape[1] % length
    x = functional.pad(x, [0, 0] * (x.dim() - 2) + [0, missing])
    chunks: Tensor = x.unflatten(1, (-1, length))
    return chunks
